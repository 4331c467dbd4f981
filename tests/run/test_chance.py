# SPDX-License-Identifier: MIT
"""Random configurations: the same from one seed, planned or refused with a reason, failures shrunk."""

import json

from ablab import check, config
from ablab.run import chance
from tests import trial as tiny


def test_a_seed_repeats_its_configuration(tmp_path):
    one, two = (chance.plans(6, 40, tiny.HERE, tmp_path) for _ in range(2))
    assert [p.hash for p in one[0]] == [p.hash for p in two[0]] and one[1] == two[1]
    assert len(one[0]) + len(one[1]) == 6 and all(one[1].values())
    assert len({p.hash for p in one[0]}) == len(one[0]) >= 3
    first = one[0][0]  # alone it is the same
    (again,), _ = chance.plans(1, int(first.name.removeprefix("random-")), tiny.HERE, tmp_path)
    assert (again.name, again.hash) == (first.name, first.hash)


def test_rules_across_symbols_are_kept_so_that_random_configurations_are_tried(tmp_path):
    made, refused = chance.plans(60, 100, tiny.HERE, tmp_path)
    bad = []
    for plan in made:
        for trial in plan.trials:
            try:
                cfg = config.load(trial.values)
                cfg.model.build(cfg.attention, cfg.mlp, 0, 256) if trial.values.get("MODEL_GPT_LAYERS", 3) < 3 else None
            except ValueError as error:
                bad.append(f"{plan.name}: {error}")
    assert len(made) >= 50 and not bad, "\n".join([*refused.values(), *bad])


def test_a_failure_is_shrunk_to_what_it_needs(tmp_path, monkeypatch):
    """A planted fault that two knobs make together."""
    step = check.Rig.train

    def faulty(self):
        step(self)
        if self.cfg.optim.section.decay_embed and self.cfg.optim.section.clip_norm < 1:
            raise RuntimeError("planted")

    monkeypatch.setattr(check.Rig, "train", faulty)
    text = 'CONFIG_OPT_DECAY_EMBED=y\nCONFIG_OPT_CLIP_NORM="0.5"\nCONFIG_OPT_WEIGHT_DECAY="0.3"\nCONFIG_SCHED_WSD=y\n'
    s = tiny.settled(tmp_path, text)
    case = check.Case(["x-s1"], "", s.values, s.where, s.config())
    check.run(case)
    assert case.stage == "train"
    assert set(check.least(case)) == {"CONFIG_OPT_DECAY_EMBED=y", 'CONFIG_OPT_CLIP_NORM="0.5"'}


def test_what_is_refused_in_words_is_no_failure(tmp_path, capsys):
    """A vocabulary below the tokenizer, at full size."""
    text = tiny.settled(tmp_path / "data", "CONFIG_MODEL_GPT_VOCAB=128\n").config()
    for random, code in ((True, 0), (False, 2)):
        plan = {"trials": [{"id": "128-s1", "title": "", "config": text}], "mode": "check", "random": random}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        assert check.main(str(tmp_path)) == code
    assert "128-s1: refused: CONFIG_MODEL_GPT_VOCAB = 128 : the tokenizer has 256 ids" in capsys.readouterr().out
