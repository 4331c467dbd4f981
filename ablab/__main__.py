# SPDX-License-Identifier: MIT
# Size: every verb with its help stands in one file, which is the list that a reader looks for.
"""The verbs: `ablab VERB [VARIABLE=value ..]`, each also a make target of the same name."""

import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ablab import configure, kconf

ROOT = kconf.ROOT
BUDGET = "TIME MAX_ITERS MAX_TOKENS EPOCHS"
PLAN = f"SEEDS SWEEP STEPS BASELINE TRACKER JOBS KEEP_GOING O {BUDGET}"
RUN = "NAME CHECK NEW FORCE YES"
TABLE = "table json csv"
SOURCE = "SOURCE ENTITY PROJECT RUN_NAME RUN_ID OUT O"
ASK_FROM = 9  # trials from which a start at a terminal is confirmed once
FLAGS = "ALL CHECK COMMIT_ONLY DDP DROP DRY_RUN FORCE FRESH FULL NEW TOKEN V YES"
ALLOWED = {  # variable -> (pattern of its whole value, what that is), for those that no symbol takes
    **dict.fromkeys(FLAGS.split(), ("[01]", "0 or 1")),
    **dict.fromkeys(
        ("CAMPAIGN", "GPU", "KCONFIG_SEED", "NAME", "O", "OUT", "PROJECT", "RUN_ID", "RUN_NAME", "STEP", "STUDY"),
        (".+", "empty; give it a value or leave it out"),
    ),
    "COUNT": ("[1-9][0-9]{0,3}", "a number of GPUs"),
    "PORT": ("0|[1-9][0-9]{0,4}", "a port"),
    "JOBS": ("auto|0|[1-9][0-9]{0,3}", "a number of trials at once, or auto"),
    "KEEP_GOING": ("[yn]", "y or n"),
    "DO": ("sync|status|test|import|record|bench", "sync, status, test, import, record or bench"),
    "RANDOM": ("[1-9][0-9]{0,4}", "a number of configurations"),
    "POINTS": ("0|[1-9][0-9]{0,8}", "a number of points, 0 for all"),
    "SHOW": ("anyway", "anyway"),
    "KIND": ("quality|speed|memory", "quality, speed or memory"),
    "SOURCE": ("local|wandb|trackio", "local, wandb or trackio"),
    "LENS": ("time|tokens|flops|memory", "time, tokens, flops or memory"),
}
Vars = dict[str, str]


@dataclass(frozen=True, slots=True)
class Verb:
    """What a verb calls, the variables that act on it, those that bare words fill in, whether CONFIG_X does, and its
    forms; one that `streams` prints as it goes."""

    call: Callable[[Vars], int]
    takes: tuple[str, ...]
    bare: tuple[str, ...]
    symbols: bool
    forms: tuple[str, ...]
    streams: bool


VERBS: dict[str, Verb] = {}


def verb(
    name: str,
    bare: str = "",
    takes: str = "",
    symbols: bool = False,
    forms: str = "table json",
    streams: bool = False,
) -> Callable:
    """Register a function as a verb; a trailing `+` on a name in `bare` takes all remaining words."""

    def add(call: Callable[[Vars], int]) -> Callable[[Vars], int]:
        known = dict.fromkeys([*bare.replace("+", "").split(), *takes.split(), "FORMAT", "V"])
        VERBS[name] = Verb(call, tuple(known), tuple(bare.split()), symbols, tuple(forms.split()), streams)
        return call

    return add


def show(v: Vars, text: str, data: Any = None) -> int:
    """Print `text`, or with FORMAT=json `data` (the text's lines where there is no better form)."""
    if v.get("FORMAT", "table") == "json":
        text = json.dumps(text.splitlines() if data is None else data, indent=1, default=str)
    return put(v, text)


def table(v: Vars, found: Any) -> int:
    """Print a report.table.Table in the form asked for, its notes to stderr; exit 1 if it is empty."""
    put(v, found.render(v.get("FORMAT", "table")))
    for note in found.notes:
        print(note, file=sys.stderr)
    return 0 if found.rows else 1


def put(v: Vars, text: str) -> int:
    """Print a text, or write it to OUT=."""
    if "OUT" not in v:
        print(text.rstrip("\n"))
        return 0
    from ablab import rundir

    rundir.write_bytes(Path(v["OUT"]).absolute(), (text.rstrip("\n") + "\n").encode())
    print(f"written: {shown(Path(v['OUT']).absolute())}")
    return 0


# Configure


@verb("defconfig", "NAME", symbols=True)
def _(v: Vars) -> int:
    """Load defconfigs/NAME[+FRAGMENT..] (or the base of study NAME, and select it) into .config."""
    return show(v, configure.defconfig(ROOT, need(v, "NAME"), [configure.make_layer(v)]))


@verb("list-defconfigs")
def _(v: Vars) -> int:
    """Defconfigs and studies, each with the comment at its head: purpose, hardware, time, expected number."""
    return show(v, configure.list_defconfigs(ROOT))


@verb("menuconfig")
def _(v: Vars) -> int:
    """Edit .config in the terminal."""
    return show(v, configure.menuconfig(ROOT))


@verb("olddefconfig", takes="DROP")
def _(v: Vars) -> int:
    """Give new symbols their defaults in .config; vanished ones are an error, DROP=1 removes and lists them."""
    return show(v, configure.olddefconfig(ROOT, v.get("DROP") == "1"))


@verb("savedefconfig", "NAME", symbols=True)
def _(v: Vars) -> int:
    """Write the minimal form of .config, and of CONFIG_X given here, to defconfigs/NAME."""
    return show(v, configure.savedefconfig(ROOT, need(v, "NAME"), [configure.make_layer(v)]))


@verb("listnewconfig")
def _(v: Vars) -> int:
    """Symbols that .config does not mention, with their values."""
    return show(v, configure.listnewconfig(ROOT))


@verb("diffconfig", "A B", symbols=True)
def _(v: Vars) -> int:
    """The fragment that turns A (default: the loaded defconfig) into B (default: .config)."""
    text = configure.diffconfig(ROOT, v.get("A", ""), v.get("B", ""), [configure.make_layer(v)])
    return show(v, text or "# no difference", text.splitlines())


@verb("allyesconfig")
def _(v: Vars) -> int:
    """.config with every bool on that can be."""
    return show(v, configure.allconfig(ROOT, "yes"))


@verb("allnoconfig")
def _(v: Vars) -> int:
    """.config with every bool off that can be."""
    return show(v, configure.allconfig(ROOT, "no"))


@verb("alldefconfig")
def _(v: Vars) -> int:
    """.config of defaults."""
    return show(v, configure.allconfig(ROOT, "def"))


@verb("randconfig", takes="KCONFIG_SEED")
def _(v: Vars) -> int:
    """A random valid .config; KCONFIG_SEED repeats one."""
    return show(v, configure.randconfig(ROOT, v.get("KCONFIG_SEED")))


@verb("why", "SYM")
def _(v: Vars) -> int:
    """Value, origin and dependencies of SYM=NAME, or what must change for SYM=NAME=value; exit 1 if nothing can."""
    code, text = configure.why(ROOT, need(v, "SYM"))
    show(v, text)
    return code


# Run


def planned(v: Vars, dotless: bool = True) -> Any:
    """The plan of .config and the make line; `dotless` loads defconfigs/demo where there is no .config.  What a GPU has
    decided counts, but for NEW=1."""
    from ablab import plan, run

    if not (ROOT / ".config").exists() and dotless:
        text = "no .config: loading defconfigs/demo; make list-defconfigs shows others, make defconfig-NAME loads one"
        print(text, file=sys.stderr)  # stdout may be for a script
        configure.defconfig(ROOT, "demo")
    configure.refresh(ROOT)
    machine, name = hardware(v), configure.origin(ROOT)["defconfig"]
    known = run.decided(results(v)) if machine.devices and v.get("NEW") != "1" else {}
    return plan.expand(configure.read(ROOT), v, machine, name=name, measured=known)


def of_study(name: str, v: Vars, machine: Any) -> Any:
    """The plan of a shipped study, whatever .config holds."""
    from ablab import plan, study

    return plan.expand(configure.layers(ROOT, study.find(name).name), dict(v), machine, name=name)


def hardware(v: Vars) -> Any:
    """This machine; with GPU= as if it had that GPU, or COUNT= of them, since what is automatic follows the device."""
    from ablab import machine

    here, gpu = machine.inventory(), v.get("GPU")
    if gpu is None:
        return here
    name = machine.named(gpu)
    return replace(here, devices=(machine.Device(kind="cuda", name=name, uuid=name, memory_bytes=0),) * count(v))


def count(v: Vars) -> int:
    """COUNT=, of GPU=.  Raises ConfigError without one."""
    if "COUNT" in v and "GPU" not in v:
        raise kconf.ConfigError(
            [f"make line: error: COUNT={v['COUNT']}: of which GPU? write GPU=a10g COUNT={v['COUNT']}"]
        )
    return int(v.get("COUNT", "1"))


def results(v: Vars) -> Path:
    """The folder of the campaigns: O=, else STUDY_RESULTS."""
    folder = v.get("O")
    if folder is None and (ROOT / ".config").exists():
        folder = kconf.settle(kconf.load(), configure.read(ROOT)).values["STUDY_RESULTS"]
    return ROOT / (folder or "results")


def campaign(v: Vars, unfinished: bool = False) -> Any:
    """CAMPAIGN=, else the one unfinished campaign, else the newest."""
    from ablab import run, rundir

    folder = results(v)
    if "CAMPAIGN" in v:
        return rundir.find(folder, v["CAMPAIGN"])
    known = rundir.campaigns(folder)
    if not known:
        raise rundir.RunError(f"{folder}: no campaign; make starts one")
    open_ = [c for c in known if not run.finished(c)]
    if unfinished and len(open_) > 1:
        raise rundir.RunError(f"{len(open_)} campaigns are unfinished: CAMPAIGN={' or '.join(c.name for c in open_)}")
    return open_[0] if len(open_) == 1 else known[-1]


def options(v: Vars, trials: int = 0) -> Any:
    from ablab import report, run

    tty = sys.stdin.isatty() and sys.stdout.isatty()

    def finish(campaign: Any) -> None:
        found = report.read(campaign)
        path = report.build(found)
        print(
            f"\n{report.summary_table(found)}\n\nreport: {shown(path.with_name('report.html'))}\n        {shown(path)}"
        )
        for picture in sorted(path.parent.glob("*.png")):
            print(f"        {shown(picture)}")

    return run.Options(
        results=Path(v["O"]) if "O" in v else None,
        name=v.get("NAME"),
        jobs=int(v["JOBS"]) if v.get("JOBS", "auto") != "auto" else None,
        keep_going=None if "KEEP_GOING" not in v else v["KEEP_GOING"] == "y",
        check=v.get("CHECK") != "0",
        yes=v.get("YES") == "1" or not tty or trials < ASK_FROM,
        force=v.get("FORCE") == "1",
        new=v.get("NEW") == "1",
        tty=tty,
        verbose=v.get("V") == "1",
        report=finish,
    )


def shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@verb("run", takes=f"{PLAN} {RUN} DRY_RUN", symbols=True, streams=True)
def _(v: Vars) -> int:
    """Plan, check, run or continue, report.  What `make` does; DRY_RUN=1 stops after the dry run."""
    from ablab import run

    todo = planned(v)
    if v.get("DRY_RUN") == "1":
        return run.check([todo], options(v))[0]
    if todo.measure and not todo.measured:
        if code := run.measure(todo, options(v)):
            print(f"nothing was started\nRESULT: exit={code}", flush=True)
            return code
        todo = planned({**v, "NEW": "0"})
    return run.start(todo, options(v, len(todo.trials)))


@verb("plan", takes=PLAN, symbols=True)
def _(v: Vars) -> int:
    """What would run and why, without running it."""
    from ablab import plan, run

    todo = planned(v)
    found, lines = run.expected(todo, options(v))
    text, data = plan.listing(todo, lines), plan.as_json(todo) | {"forecast": found}
    if (reuse := run.reused(todo, options(v))) is not run.NOTHING:
        text += "".join(f"reused      {line}\n" for line in [*reuse.lines(), *reuse.differences])
        data["reused"] = [*reuse.lines(), *reuse.differences]
    return show(v, text, data)


@verb("check", takes=f"{PLAN} STEP STUDY GPU DDP RANDOM KCONFIG_SEED", symbols=True)
def _(v: Vars) -> int:
    """Dry-run every step of the configured study, small: build, train, evaluate, save, load, resume, decode.

    STUDY=NAME and STEP=NAME:ID choose shipped ones, STEP=ID one of .config; without .config all shipped studies.
    DDP=1 adds a step in two processes, GPU=a10g whether full-size models fit there.  Exit 1 if any fails, 4 if one
    cannot fit.  RANDOM=200 tries random configurations instead, from KCONFIG_SEED on, and shrinks what fails.  What
    was not covered is listed; the verdict is also a file, whose path is the last line.
    """
    from ablab import run
    from ablab.run import chance

    name, _, step = v.get("STEP", "").rpartition(":")
    if name and v.get("STUDY", name) != name:
        raise kconf.ConfigError([f"make line: error: STEP={v['STEP']}: is not of STUDY={v['STUDY']}; keep one"])
    name, dotted, machine = name or v.get("STUDY", ""), (ROOT / ".config").exists(), hardware(v)
    shipped = sorted(p.stem for p in (ROOT / "studies").glob("*.study"))
    if step and not name and not dotted:
        text = f"STEP={step}: of which study? there is no .config; write STEP=NAME:{step}; studies: {' '.join(shipped)}"
        raise kconf.ConfigError([f"make line: error: {text}"])
    asked = {"gpu": v.get("GPU"), "ddp": v.get("DDP") == "1", "random": "RANDOM" in v}
    if "RANDOM" in v:
        seed = number("KCONFIG_SEED", v.get("KCONFIG_SEED") or str(int(time.time())), int)
        plans, refused = chance.plans(number("RANDOM", v["RANDOM"], int), seed, machine, results(v) / "random")
        print(f"random configurations from KCONFIG_SEED={seed} on: {len(plans)} planned, {len(refused)} refused")
    elif name or not dotted:
        plans = [of_study(n, v, machine) for n in ([name] if name else shipped)]
    else:
        plans = [planned(v)]
    json_ = v.get("FORMAT") == "json"
    with contextlib.redirect_stdout(sys.stderr) if json_ else contextlib.nullcontext():
        code, place = run.check(
            plans, options(v), step or None, named=bool(name) or not dotted or "RANDOM" in v, **asked
        )
    if json_ and place:
        print(place.read_text(), end="")
    return code


@verb("estimate", "CAMPAIGN", takes=f"{PLAN} GPU COUNT", symbols=True, streams=True)
def _(v: Vars) -> int:
    """Time, memory, cost and disk before a start, for this machine or GPU=a10g COUNT=4 (exit 4 if a model cannot fit);
    with a running campaign the time left and its basis."""
    from ablab import run

    if "CAMPAIGN" not in v:
        number_of = count(v)
        return run.forecast(planned(v), options(v), v.get("GPU"), number_of)
    print(run.left(campaign(v)))
    return 0


@verb("continue", "CAMPAIGN", takes="O JOBS KEEP_GOING", streams=True)
def _(v: Vars) -> int:
    """Go on with a campaign: reap the dead, verify what is done, run what is missing.  Deletes nothing."""
    from ablab import run

    return run.resume(campaign(v, unfinished=True), options(v))


@verb("rerun", "TARGET", takes="STATE CAMPAIGN O JOBS KEEP_GOING", streams=True)
def _(v: Vars) -> int:
    """Run trials again from step 0: TARGET=<glob or hash>, STATE=failed, or both."""
    from ablab import run

    return run.rerun(campaign(v), v.get("TARGET"), v.get("STATE"), options(v))


@verb("stop", "CAMPAIGN", takes="O")
def _(v: Vars) -> int:
    """Ask the running trials of a campaign to save and leave; `make continue` resumes them."""
    from ablab import run

    return show(v, run.stop(campaign(v)))


@verb("status", "CAMPAIGN", takes="O")
def _(v: Vars) -> int:
    """Where a campaign and each of its trials stand."""
    from ablab import run

    found = run.status(campaign(v))
    return show(v, run.listing(found), found)


@verb("amend", "CAMPAIGN", takes="ADD_SEEDS O")
def _(v: Vars) -> int:
    """Add ADD_SEEDS=N further seeds to every arm of a campaign; nothing that exists changes."""
    from ablab import run

    return show(v, run.amend(campaign(v), v.get("ADD_SEEDS", "")))


@verb("data", takes=PLAN, symbols=True)
def _(v: Vars) -> int:
    """Fetch and prepare the data set of .config, or verify that it is there."""
    from ablab import config

    (data,) = config.create("DATA", planned(v).trials[0].values)
    folder = data.prepare()
    facts = data.manifest()
    splits = ", ".join(f"{name} {split[data.unit]:,} {data.unit}" for name, split in facts["splits"].items())
    return show(v, f"{facts['name']}: {splits}, sha256 {facts['sha256'][:12]}, {shown(folder)}", facts)


@verb("sample", "TRIAL PROMPT", takes="TOKENS TEMPERATURE TOP_K SEED CAMPAIGN O")
def _(v: Vars) -> int:
    """Text from a trained model: TRIAL=<id> PROMPT='ROMEO.' [TOKENS=200 TEMPERATURE=0.8 TOP_K= SEED=1]."""
    from ablab import infer
    from ablab.report import query

    trial = query.resolve(results(v), [f"{v.get('CAMPAIGN', 'latest')}/{need(v, 'TRIAL')}"])[0].dir
    kinds = {"TOKENS": int, "TEMPERATURE": float, "TOP_K": int, "SEED": int}
    given = {name.lower(): number(name, v[name], kind) for name, kind in kinds.items() if name in v}
    return show(v, infer.sample(trial, v.get("PROMPT", "\n"), **given))


@verb("doctor", takes="O")
def _(v: Vars) -> int:
    """Check the machine: devices, versions, compiler, and what the file system under O= can do."""
    from ablab.run import doctor

    return doctor.main(results(v), v.get("FORMAT", "table"))


@verb("tracker", "DO TARGET", takes="CAMPAIGN TRACKER FRESH NAME O", forms=TABLE)
def _(v: Vars) -> int:
    """Mirrors of a campaign: DO=status, or DO=sync to deliver what trackers lack (FRESH=1: all of it, as further runs).
    DO=test TARGET=trackio sends a made-up trial, kills, replays and reads back.  DO=import
    TARGET=wandb:ENTITY/PROJECT/RUN or trackio:PROJECT/RUN brings a run as imported:NAME."""
    from ablab.run import mirror

    do, target = need(v, "DO"), v.get("TARGET") or v.get("CAMPAIGN")
    if do in ("test", "import"):
        return mirror.other(do, need(v, "TARGET"), results(v), v.get("NAME", ""))
    found = campaign({**v, "CAMPAIGN": target} if target else v)
    if do == "status":
        return table(v, mirror.status(found))
    return mirror.sync(found, words(v, "TRACKER"), v.get("FRESH") == "1")


# Judge


@verb("report", "CAMPAIGN", takes="O")
def _(v: Vars) -> int:
    """Write report.html, report.md, table.csv and the figures of a campaign, from its files alone."""
    from ablab import report

    found = report.read(campaign(v))
    path = report.build(found)
    pages = f"report: {shown(path.with_name('report.html'))}\n        {shown(path)}"
    return show(v, f"{report.summary_table(found)}\n\n{pages}")


@verb("plots", "CAMPAIGN", takes="SET O")
def _(v: Vars) -> int:
    """Draw the figures of a campaign: SET=all (default), torch_compile (exit 3 if trials differ in more than that), or
    one by name."""
    from ablab.report import figures

    code, lines = figures.draw(campaign(v), v.get("SET", "all"))
    show(v, "\n".join(lines), lines)
    return code


@verb("plot-check", "PATHS+", takes="O", forms=TABLE)
def _(v: Vars) -> int:
    """Check that the pictures below PATHS=docs are what their campaigns below O= say: ok, excluded, stale, orphan or
    edited; any but the first two exits 1."""
    from ablab.report import figures

    found = figures.check([Path(p) for p in words(v, "PATHS") or ["docs"]], results(v))
    table(v, found)
    return 0 if figures.is_good(found) else 1


@verb("dashboard", takes="PORT BIND TOKEN ALLOW_HOST O", streams=True)
def _(v: Vars) -> int:
    """Serve a read-only view of the campaigns on PORT=8642 of BIND=127.0.0.1 until Ctrl-C; TOKEN=1, or any other BIND,
    asks for a token; ALLOW_HOST='name ..' are further names of this machine."""
    from ablab.report import serve

    options = {"bind": v.get("BIND", serve.LOOPBACK[0]), "token": v.get("TOKEN") == "1"}
    return serve.main(results(v), port=int(v.get("PORT", "8642")), allowed=v.get("ALLOW_HOST", ""), **options)


@verb("watch", "CAMPAIGN", takes="O", streams=True)
def _(v: Vars) -> int:
    """Watch a campaign in the terminal; q leaves the view and nothing else.  Without a terminal a line every 30 s."""
    from ablab.report import watch

    return watch.main(campaign(v))


def trials(v: Vars, name: str) -> list[Any]:
    """The trials that the words of a variable select, here or with SOURCE= at a tracker."""
    from ablab.report import query, source

    if v.get("SOURCE", "local") != "local":
        return source.find(v, words(v, name))
    if alien := [n for n in ("ENTITY", "PROJECT", "RUN_NAME", "RUN_ID") if n in v]:
        raise kconf.ConfigError(
            [f"make line: error: {alien[0]}={v[alien[0]]}: of a tracker; add SOURCE=wandb or trackio"]
        )
    return query.resolve(results(v), need(v, name).split())


@verb("compare", "A B+", takes=f"KEY LENS SHOW {SOURCE}", forms=TABLE)
def _(v: Vars) -> int:
    """Trials side by side, baseline A first: what differs in the protocol, then metrics.  Exit 3 if they differ in
    what no study declared; SHOW=anyway prints the values all the same.  LENS=time|tokens|flops|memory compares where
    both sides have used as much."""
    from ablab.report import compare

    sides = trials(v, "A"), [trials(v | {"B": name}, "B") for name in need(v, "B").split()]
    found = compare.compare(*sides, keys=words(v, "KEY"), anyway=v.get("SHOW") == "anyway", lens=v.get("LENS", ""))
    if v.get("FORMAT") == "csv":
        put(v, compare.flat(found).csv())
    else:
        show(v, "\n\n".join(c.text() for c in found), [c.data() for c in found])
    return max(c.code for c in found)


@verb("ls", "SEL+", takes=f"WHERE SORT {SOURCE}", forms=TABLE)
def _(v: Vars) -> int:
    """Campaigns, or the trials of SEL: CAMPAIGN, CAMPAIGN/TRIAL, a hash prefix, latest, step:ID or imported:NAME;
    globs work.  WHERE='state=done and val_loss<3.3', SORT=column."""
    from ablab.report import query
    from ablab.report.table import line

    if v.get("SOURCE", "local") == "local" and not v.keys() & {"SEL", "WHERE"}:
        damage: list[str] = []
        found = query.campaigns(results(v), damage)
        print("".join(f"{line(text)}\n" for text in damage), end="", file=sys.stderr)
    else:
        found = query.ls(trials({"SEL": "*"} | v, "SEL"), v.get("WHERE", ""))
    return table(v, query.arranged(found, v.get("SORT", "")))


@verb("keys", "SEL+", takes=f"PREFIX {SOURCE}", forms=TABLE)
def _(v: Vars) -> int:
    """Metrics of trials: name, unit, points, first and last step.  Exit 1 if there is none."""
    from ablab.report import query

    return table(v, query.keys(trials(v, "SEL"), v.get("PREFIX", "")))


@verb("series", "SEL+", takes=f"KEY X POINTS {SOURCE}", forms=TABLE)
def _(v: Vars) -> int:
    """Points of the metrics in KEY over X=step|tokens|train_s|wall_s|flops; POINTS=N thins the output only."""
    from ablab.report import query

    keys = need(v, "KEY").replace(",", " ").split()
    points = number("POINTS", v.get("POINTS", "0"), int)
    return table(v, query.series(trials(v, "SEL"), keys, v.get("X", "step"), points))


@verb("diff", "A B", takes=f"ALL {SOURCE}", forms=TABLE)
def _(v: Vars) -> int:
    """Effective values that differ between two trials, who set them, and what differs in the built model."""
    from ablab.report import query

    a, b = (trials(v, name)[0] for name in "AB")
    table(v, query.diff(a, b, v.get("ALL") == "1"))
    return 0


@verb("verify", "CAMPAIGN", takes="CLAIM KIND COMMIT_ONLY RECHECK SIGN O")
def _(v: Vars) -> int:
    """Judge whether a campaign may be published: certificate.json, or exit 3 with every reason why not.

    CLAIM=R1,R2 claims some contrasts only, KIND=speed or memory another quantity than quality, SIGN=file signs with
    that SSH key.  COMMIT_ONLY=1 completes a certificate that lacks nothing but network.  RECHECK=file judges a
    certificate, or a copied bundle (.tar), again.
    """
    from ablab.verify import issue

    key = Path(v["SIGN"]) if "SIGN" in v else None
    if "RECHECK" in v:
        body, wrong = issue.recheck(Path(v["RECHECK"]))
        text = "\n".join([*(f"DOES NOT HOLD {w}" for w in wrong), issue.listing(body, bool(wrong))])
        show(v, text, {"certificate": body, "wrong": wrong})
        return issue.REFUSED if wrong or body["findings"] else 0
    if v.get("COMMIT_ONLY") == "1":
        body = issue.commit_only(campaign(v), key)
    else:
        claim = [arm.strip() for arm in v.get("CLAIM", "").split(",") if arm.strip()]
        body = issue.certify(campaign(v), claim, v.get("KIND", "quality"), key)
    show(v, issue.listing(body), body)
    return issue.REFUSED if body["findings"] else 0


@verb("bundle", "CAMPAIGN", takes="O")
def _(v: Vars) -> int:
    """Write CAMPAIGN.tar: its certificate and all files that it vouches for, without weights."""
    from ablab.verify import issue

    found = campaign(v)
    return show(v, f"bundle: {shown(issue.bundle(found, Path(f'{found.name}.tar')))}")


@verb("reproduce", "CERT", takes="TRIAL YES", streams=True)
def _(v: Vars) -> int:
    """Run a trial of a certificate (or bundle) again from a fresh clone: CERT=file [TRIAL=id].

    Exit 0: weights equal, or inside the certified interval; 1: not reproduced; 3: environment or data differ.
    """
    from ablab.verify import reproduce

    return reproduce.reproduce(Path(need(v, "CERT")), v.get("TRIAL"), v.get("YES") == "1")


@verb("gpu", "SEL+", takes=f"FULL {SOURCE}", forms=TABLE)
def _(v: Vars) -> int:
    """Busy time, memory activity and memory of the devices of trials, and CPU and RAM: mean, median, p5, p95, max of
    all samples, hints and what limits them; FULL=1 adds power, energy, temperature, clocks, throttling, foreign
    processes.  Exit 1 if no trial has telemetry."""
    from ablab.report import gpu, source

    found, full = trials(v, "SEL"), v.get("FULL") == "1"
    if v.get("SOURCE", "local") != "local":
        return table(v, source.gpu(found, full))
    left = [(t, gpu.recorded(t)) for t in found]
    found = gpu.table(left, full)
    said = [gpu.remarks(t, samples, full) for t, samples in left if samples]
    if v.get("FORMAT", "table") == "csv":
        return table(v, found)
    show(v, "\n".join([found.text(), *map(gpu.text, said)]), {"table": json.loads(found.json()), "trials": said})
    return 0 if found.rows else 1


@verb("telemetry", "DO OUT")
def _(v: Vars) -> int:
    """DO=record OUT=file.json: what the libraries, files and commands of this machine tell of its devices, with
    identities hashed, as the tests read it."""
    from ablab.telemetry import _tape

    if need(v, "DO") != "record":
        raise kconf.ConfigError([f"make line: error: DO={v['DO']}: not record"])
    path = Path(need(v, "OUT"))
    path.write_text(_tape.record(pause=lambda: time.sleep(1)))
    return show(v, f"recorded: {path}; look at it before you share it")


@verb("machine", "DO")
def _(v: Vars) -> int:
    """DO=bench: measure matrix products and copies of the CPU and each GPU, for the verdicts of `make gpu`."""
    if need(v, "DO") != "bench":
        raise kconf.ConfigError([f"make line: error: DO={v['DO']}: not bench"])
    from ablab import machine, peaks

    found = peaks.bench()
    lines = [
        f"{k}: bf16 {p['bf16']:.4g} TFLOP/s, fp32 {p['fp32']:.4g} TFLOP/s, copy {p['gbs']:.4g} GB/s"
        for k, p in found.items()
    ]
    return show(v, "\n".join([*lines, f"kept in {machine.peaks_file()}"]), found)


@verb("power", "CAMPAIGN", takes="EFFECT O")
def _(v: Vars) -> int:
    """Seeds, hours and cost that would decide each contrast, from a pilot of three seeds or more, and the noise behind
    them; EFFECT=0.01 is the difference to be seen, by default the margin."""
    from ablab.report import load, power

    effect = number("EFFECT", v["EFFECT"], float) if "EFFECT" in v else None
    found = load.read(campaign(v))
    plan, noise = power.plan(found, effect), power.noise(found, power.siblings(found))
    data = {"plan": json.loads(plan.json()), "noise": json.loads(noise.json())}
    return show(v, f"{plan.text()}\n\n{noise.text()}", data)


@verb("placebo", takes="O")
def _(v: Vars) -> int:
    """All A/A comparisons of all campaigns: how many found a difference that cannot be there, with its interval."""
    from ablab.report import power

    found, text = power.placebo(results(v))
    return show(v, f"{found.text()}\n{text}", {"comparisons": json.loads(found.json()), "rate": text})


@verb("metrics")
def _(v: Vars) -> int:
    """The registry of metrics: name, unit, direction, who writes it and when."""
    from ablab import metrics

    return show(v, metrics.markdown())


@verb("help", "VERB")
def _(v: Vars) -> int:
    """This list; `make help VERB=plan` prints one verb with its variables."""
    if "VERB" in v:
        return show(v, usage(v["VERB"]))
    first = {name: (each.call.__doc__ or "").partition("\n")[0] for name, each in VERBS.items()}
    lines = [f"  {name:16} {text}" for name, text in first.items()]
    develop = "  style test test-all golden bench bench-check gpu-check clean mrproper    for developers"
    head = "make VERB [VARIABLE=value ..], or ablab VERB; plain make is run, defconfig-NAME is defconfig."
    known = f"For plan and run: CONFIG_X= {PLAN} {RUN} DRY_RUN.  V=1 shows commands, FORMAT=json is for scripts."
    return show(v, "\n".join([head, *lines, develop, known]))


def usage(name: str) -> str:
    """The help text of one verb.  Raises ConfigError for an unknown one."""
    known = lookup(name)
    symbols = " CONFIG_X=" if known.symbols else ""
    bare = " ".join(known.bare)
    text = " ".join((known.call.__doc__ or "").split())
    return f"ablab {name} {bare}\n{text}\nvariables: {' '.join(known.takes)}{symbols}"


def lookup(name: str) -> Verb:
    if name.startswith("defconfig-"):
        name = "defconfig"
    if name not in VERBS:
        near = kconf.nearest(name, VERBS)
        raise kconf.ConfigError([f"make: error: {name}: no such target; nearest: {near}; make help lists them"])
    return VERBS[name]


def need(v: Vars, name: str) -> str:
    """A variable that must be given.  Raises ConfigError."""
    if not v.get(name):
        raise kconf.ConfigError([f"make line: error: {name}= is missing; ablab help VERB prints what a verb takes"])
    return v[name]


def words(v: Vars, name: str) -> list[str]:
    """A variable as a list; blanks and commas divide it."""
    return v.get(name, "").replace(",", " ").split()


def number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise kconf.ConfigError([f"make line: error: {name}={text}: not a number"]) from None


def parse(words: Iterable[str], known: Verb, environment: dict[str, str]) -> Vars:
    """Variables of a call: make's by name from the environment, then `X=value`, `--x value` and bare words."""
    v = {name: environment.get(name, "") for name in environment.get("ABLAB_MAKE_VARS", "").split()}
    bare, words, seen = list(known.bare), list(words), set()
    while words:
        word = words.pop(0)
        option = word.startswith("--")
        name, given, value = word.lstrip("-").partition("=") if option else word.partition("=")
        if option:
            name = name.replace("-", "_").upper()
            is_flag = ALLOWED.get(name, ("",))[0] == "[01]" and words[:1] not in (["0"], ["1"])
            if name == "SHOW_ANYWAY" or (is_flag and not given):
                name, given, value = ("SHOW", "=", "anyway") if name == "SHOW_ANYWAY" else (name, "=", "1")
            if not given and not words:
                raise kconf.ConfigError([f"make line: error: {word}: needs a value"])
            value = value if given else words.pop(0)
        elif not (given and name.replace("_", "").isalnum() and name.isupper()):
            if not bare:
                raise kconf.ConfigError([f"make line: error: {word}: expected VARIABLE=value"])
            name, value = bare[0].rstrip("+"), word
            if bare[0].endswith("+"):
                value = f"{v.get(name, '')} {word}".strip()
            else:
                bare.pop(0)
        if option and name in seen and name == "KEY":
            value = f"{v[name]} {value}"
        elif name in seen and f"{name}+" not in known.bare:
            raise kconf.ConfigError([f"make line: error: {word}: {name} is given twice; keep one"])
        seen.add(name)
        v[name] = value
    return v


def check_values(v: Vars, known: Verb) -> None:
    """Raise ConfigError for values that are not text, and for those of FORMAT and ALLOWED that nothing takes."""
    errors = [f"{name}: not UTF-8" for name, text in v.items() if _is_torn(text)]
    if v.get("FORMAT", "table") not in known.forms:
        errors.append(f"FORMAT={v['FORMAT']}: not {' or '.join(known.forms)}")
    for name, text in v.items():
        pattern, what = ALLOWED.get(name, ("(?s:.*)", ""))
        if not re.fullmatch(pattern, text):
            errors.append(f"{name}={text}: " + (what if pattern == ".+" else f"not {what}"))
    if errors:
        raise kconf.ConfigError(f"make line: error: {e}" for e in errors)


def _is_torn(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)  # bytes that the locale could not read


class _Heard(io.StringIO):
    """Keeps what is printed, and passes it on to stderr."""

    def write(self, text: str) -> int:
        sys.stderr.write(text)
        return super().write(text)


def heard(call: Callable[[Vars], int], v: Vars) -> int:
    """Call a verb that prints as it goes: its text goes to stderr, then its lines to stdout as one JSON list."""
    with contextlib.redirect_stdout(_Heard()) as text:
        code = call(v)
    show(v, text.getvalue())
    return code


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; every error of the user is one text on stderr and exit 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words else "help"
    try:
        if name == "--no-such-target":
            lookup(words[0])
        if name in ("-h", "--help"):
            name = "help"
        if "--help" in words:
            print(usage(name))
            return 0
        known = lookup(name)
        if name.startswith("defconfig-"):
            words.insert(0, name.removeprefix("defconfig-"))
        v = parse(words, known, dict(os.environ))
        configure.check_environment(os.environ, v)
        configure.check_variables(v, known.takes, known.symbols)
        check_values(v, known)
        return heard(known.call, v) if known.streams and v.get("FORMAT") == "json" else known.call(v)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("ABLAB_TRACE"):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: error: {error.strerror}; see that it is there and can be written, then try again"
        print(text, file=sys.stderr)
        return getattr(error, "exit_code", 2)  # 1 where what was asked for does not exist


if __name__ == "__main__":
    sys.exit(main())
