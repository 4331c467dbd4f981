# SPDX-License-Identifier: MIT
"""report.html in a real browser: inert whatever it holds, silent on the network, readable; no view moves a mean."""

import json
import re

import pytest

from ablab import report
from ablab.report import blocks, index, load, page, web
from ablab.rundir import Campaign
from tests import browser
from tests.report import campaign, test_figures

IMG = "<img src=x onerror=alert(1)>"
END = "</script><script>window.pwned = 1</script>\u2028"
SHELL = "\x1b]0;pwned\x07\x1b[31m"
# what a reader must be able to tell from its background, WCAG 2.2 success criterion 1.4.3
CONTRAST = """(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const part = v => v <= 10 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const lum = c => .2126 * part(c[0]) + .7152 * part(c[1]) + .0722 * part(c[2]);
  const back = node => { for (; node; node = node.parentElement) {
    const c = rgb(getComputedStyle(node).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  const bad = [];
  for (const node of document.querySelectorAll("body *")) {
    if (["SCRIPT", "NOSCRIPT", "OPTION"].includes(node.tagName) || !node.getClientRects().length) continue;
    if (![...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const css = getComputedStyle(node), ink = rgb(node instanceof SVGElement ? css.fill : css.color).slice(0, 3);
    const [a, b] = [lum(ink), lum(back(node))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) bad.push(node.tagName + " " + node.textContent.slice(0, 30) + " " + ratio.toFixed(2));
  }
  return bad;
})()"""


def finals(arm, seed):
    return 2.4 + 0.01 * seed - {"R0": 0.0, "R1": 0.05, "R2": 0.03}[arm[0]] + 0.001 * (seed * 3 % 7)


def hostile(folder, **options) -> Campaign:
    """Hostile texts in every place that a user or a program can write to."""
    made = campaign.write(
        folder,
        finals,
        seeds=(1, 2, 3, 4),
        fates={"r2-s3": "diverged", "r1-s4": "failed"},
        titles={"R0": IMG, "R1": "=cmd|' /C calc'!A0", "R2": END},
        symbols=lambda arm: {
            "MODEL_GPT": "y",
            "DATA_NAME": f'"{END[:-1]}"',
            "OPT_LR": '"6e-4"' if arm[0] == "R0" else '"1e-3"',
        },
        question=IMG + END + SHELL,
        margin=0.01,
        **options,
    )
    (made.trial(next(n for n in made.records() if n.startswith("r2-s3"))).attempt(1).log).write_text(
        f"{SHELL}{IMG}\n{END}\n"
    )
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = hostile(tmp_path_factory.mktemp("results"))
    report.build(found)
    return found


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    found = browser.Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield found
    found.close()


def address(made, name="report.html"):
    return (made.report / name).as_uri()


def put(tab, where, value, event="input", number=0):
    """Give a field a value as a user would."""
    field = f"document.querySelectorAll({where!r})[{number}]"
    tab.run(f"(n => {{ n.value = {value!r}; n.dispatchEvent(new Event({event!r})); }})({field})")


def place(tab, where):
    """Left, top, width and height of an element on the screen."""
    tab.run(f"document.querySelector({where!r}).scrollIntoView({{block: 'center'}})")
    return tab.run(
        f"(r => [r.left, r.top, r.width, r.height])(document.querySelector({where!r}).getBoundingClientRect())"
    )


def texts(tab, where):
    return tab.run(f"[...document.querySelectorAll({where!r})].map(n => n.textContent)")


# Without a browser


def test_a_thinned_curve_keeps_its_ends_and_its_extremes():
    values = [float((i * 7919) % 1013) for i in range(10_000)]
    values[4321], values[777] = 5000.0, -5000.0
    keep = blocks.thin(values, values, 400)
    assert len(keep) <= 400 and {0, 9999, 4321, 777} <= set(keep) and keep == sorted(keep)
    assert blocks.thin(values[:400], values[:400], 400) == list(range(400))


def test_data_can_neither_end_its_block_nor_be_anything_but_data():
    text = blocks.document(IMG, {"x": IMG + END + "&amp;"})
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert not set("<>&\u2028\u2029") & set(block) and json.loads(block)["x"] == IMG + END + "&amp;"
    assert "<title>&lt;img" in text and " style=" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S)


def test_trial_pages_are_small_and_rewritten_only_when_they_change(tmp_path):
    made = hostile(tmp_path)
    report.build(made)
    pages = sorted((made.report / "trials").iterdir())
    assert len(pages) == 12 and all(p.stat().st_size <= 60_000 for p in pages)
    c = load.read(made)
    assert web.build(c, page.judge(c), ["loss_curves", "ablation_forest"]) == []
    summary = c.trials[0].dir.file("done")
    summary.write_text(summary.read_text().replace(" ", "  ", 1))
    pages[0].write_text("torn")
    c = load.read(Campaign.open(made.path))
    assert [p.name for p in web.build(c, page.judge(c), [])] == [f"{c.trials[0].id}.html", "report.html"]


def test_a_trial_with_thousands_of_rows_and_metrics_has_a_small_page(made):
    c = load.read(made)
    t = c.trials[0]
    many = [
        {"step": i, "tokens": i * 7, "train_s": i**1.1, "wall_s": i**1.2, "flops": i * 9, "m": {}} for i in range(3000)
    ]
    for i, row in enumerate(many):
        row["m"] = (
            {"of_another_version": i}
            | {f"attn/{k}/gate": (i * 7919 % 1013) / 7 for k in range(40)}
            | {"val_loss": (i * 31 % 997) / 3}
        )
    vars(t)["columns"] = index.pack(many)
    sizes = [len(blocks.document("t", web.trial_model(c, t, {}, n))) for n in (400, 20)]
    assert sizes[0] > web.PAGE_BYTES > sizes[1]


def test_telemetry_of_a_trial_is_drawn_with_its_gaps(tmp_path):
    made = campaign.write(tmp_path, finals, seeds=(1,))
    assert not [*web.telemetry(load.read(made).trials[0], 400)]
    test_figures.telemetry(made)
    block, said = web.telemetry(load.read(made).trials[0], 400)
    assert [arm["name"] for arm in block["arms"]] == ["device 0", "device 1"]
    busy = block["arms"][0]["series"]["busy_pct"]
    assert [x for x, y in zip(busy["x"]["s"], busy["y"], strict=True) if y is None] == [39.5]
    assert said["items"][-1].startswith("verdict: ") and any("throttled by power" in text for text in said["items"])


def test_a_difference_that_nobody_declared_is_a_confounder(tmp_path):
    facts = lambda arm: {"batch": {**campaign.manifest_facts()["batch"], "effective": 12 if arm[0] == "R0" else 16}}
    made = campaign.write(tmp_path, finals, facts=facts)
    found = web.confounders(load.read(made))
    assert any(text.startswith("R1 - R0: batch.effective: 12 | 16") for text in found)
    clean = load.read(campaign.write(tmp_path, finals, name="clean"))
    assert web.confounders(clean)[0].startswith("None found")


# In a browser


@browser.needed
@pytest.mark.parametrize("name", ["report.html", "trials/r2-s3.html", "trials/r0-s1.html"])
def test_hostile_names_and_logs_are_inert_and_nothing_is_requested(tab, made, name):
    tab.open(address(made, name))
    assert (tab.requests, tab.errors, tab.dialogs) == ([address(made, name)], [], [])
    assert tab.run("[typeof window.pwned, document.images.length, document.scripts.length]") == ["undefined", 0, 2]
    assert "\x1b" not in tab.run("document.body.innerText")
    if name != "trials/r0-s1.html":
        assert IMG in tab.run("document.body.innerText") and "</script>" in tab.run("document.body.innerText")


@browser.needed
def test_the_policy_stops_what_is_added_to_a_page(tab, made, tmp_path):
    bad = tmp_path / "bad.html"
    extra = '<script>window.pwned = 1</script><img src="http://127.0.0.1:9/x"><p style="color: red" onclick="x()">x</p>'
    bad.write_text((made.report / "report.html").read_text().replace("</body>", extra + "</body>"))
    tab.open(bad.as_uri())
    assert tab.run("typeof window.pwned") == "undefined"
    assert tab.blocked == ["http://127.0.0.1:9/x"] and "Content Security Policy" in " ".join(tab.errors)
    assert tab.run("getComputedStyle(document.body.lastElementChild).color") != "rgb(255, 0, 0)"


@browser.needed
def test_rows_sort_filter_and_group_and_no_mean_moves(tab, made):
    tab.size(1280, 1000)
    tab.open(address(made))
    value = "#trials tbody tr td:nth-child(5)"
    before = texts(tab, "#arms tbody td")
    tab.run("document.querySelectorAll('#trials th button')[4].click()")
    ascending = [float(v) for v in texts(tab, value) if v != "-"]
    assert ascending == sorted(ascending) and len(ascending) == 10
    tab.run("document.querySelectorAll('#trials th button')[4].click()")
    assert [float(v) for v in texts(tab, value) if v != "-"] == ascending[::-1] and texts(tab, value)[-2:] == ["-", "-"]
    put(tab, "#trials select", "1", "change")
    heads = texts(tab, "#trials tr.group td")
    assert heads[0].startswith("arm R0: 4 of 4 rows shown, mean val_loss final 2.4") and len(heads) == 3
    put(tab, "#trials input", "seed<3 -r2")
    hidden = texts(tab, "#trials tr.group td")
    assert hidden == [text.replace("4 of 4", "2 of 4") for text in heads[:2]]
    assert "4 of 12 rows" in texts(tab, "#trials .tools span")
    assert texts(tab, "#arms tbody td") == before


@browser.needed
def test_a_curve_tells_its_values_under_the_pointer_and_changes_its_axis(tab, made):
    tab.size(1280, 1000)
    tab.open(address(made))
    x, y, wide, high = place(tab, "#curves .chart")
    tab.move(x + wide * 0.75, y + high / 2)
    tip = tab.wait("!document.querySelector('.tip').hidden && document.querySelector('.tip').textContent")
    assert tip.startswith("step 1") and "n=4" in tip and "R1" in tip
    raw = tab.run("document.querySelectorAll('#curves path.curve')[0].getAttribute('d')")
    put(tab, "#curves input[type=range]", "0.9")
    assert tab.run("document.querySelectorAll('#curves path.raw')[0].getAttribute('d')") == raw
    assert tab.run("document.querySelectorAll('#curves path.curve')[0].getAttribute('d')") != raw
    put(tab, "#curves select", "tokens", "change", 1)
    assert "training tokens" in texts(tab, "#curves svg text")
    assert tab.run("document.querySelectorAll('#curves path.range').length") == 3


@browser.needed
def test_a_verdict_opens_the_trials_that_it_rests_on(tab, made):
    tab.open(address(made))
    tab.run("document.querySelector('.forest summary').click()")
    assert "r1-s1 r1-s2 r1-s3 r0-s1 r0-s2 r0-s3 r0-s4" in tab.run("document.querySelector('.forest .row').innerText")


@browser.needed
def test_the_configuration_shows_what_differs(tab, made):
    tab.open(address(made))
    assert texts(tab, "#configuration tbody td") == ["OPT_LR", '"6e-4"', '"1e-3"']
    tab.run("document.querySelector('#configuration input[type=checkbox]').click()")
    assert len(texts(tab, "#configuration tbody tr")) == 3


@browser.needed
@pytest.mark.parametrize("name", ["report.html", "trials/r2-s3.html", "trials/r0-s1.html"])
def test_a_phone_needs_no_sideways_scrolling_and_text_has_contrast_in_both_themes(tab, made, name):
    for dark in (False, True):
        tab.size(375, 800, dark=dark, phone=True)
        tab.open(address(made, name))
        assert tab.run("document.documentElement.scrollWidth") == 375
        assert tab.run(CONTRAST) == []
    tab.size(1280, 900)
    tab.open(address(made, name))
    tab.run("document.querySelector('.top button').click(); document.querySelector('.top button').click()")
    assert tab.run("[document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor]") == [
        "dark",
        "rgb(13, 17, 23)",
    ]
    tab.run("document.querySelector('.top button').click()")


@browser.needed
def test_low_contrast_is_seen(tab, made):
    tab.open(address(made))
    tab.run("document.querySelector('.lead').style.color = '#bbb'")
    assert len(tab.run(CONTRAST)) == 1


@browser.needed
def test_a_long_table_draws_only_what_is_in_view(tab, tmp_path):
    rows = [[f"t{i}", (i * 7919) % 5000] for i in range(5000)]
    block = {"type": "table", "columns": [{"name": "trial"}, {"name": "value"}], "rows": rows, "filter": True}
    model = {"title": "x", "banners": [], "lead": "", "facts": [], "sections": [{"title": "rows", "blocks": [block]}]}
    (tmp_path / "long.html").write_text(blocks.document("x", model))
    tab.size(1280, 900)
    tab.open((tmp_path / "long.html").as_uri())
    assert tab.run("document.querySelectorAll('tbody tr').length") < 80
    tab.run("document.querySelectorAll('th button')[1].click()")
    assert texts(tab, "tbody tr:first-child td") == ["t0", "0"]
    tab.run("document.querySelector('.scroll').scrollTop = 2500 * 29")
    seen = tab.wait(
        "(v => v.includes('2500') && v)([...document.querySelectorAll('tbody td:last-child')].map(n => n.textContent))"
    )
    assert len(seen) < 80
