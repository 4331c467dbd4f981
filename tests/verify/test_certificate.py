# SPDX-License-Identifier: MIT
"""A certificate is issued for a public commit only, and holds only as long as all that it vouches for is unchanged."""

import json
import os
import re
import shutil
import subprocess

import pytest

from ablab import __main__ as cli
from ablab.report import build, certificate, load, page, serve
from ablab.report.certificate import CertificateError
from ablab.rundir import RunError
from ablab.verify import _public, issue
from tests.report.campaign import STUDY
from tests.verify import fair

FILE = ("file",)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    return fair.repository(tmp_path_factory.mktemp("git") / "public")


@pytest.fixture(scope="module")
def made(tmp_path_factory, public):
    """A campaign with an issued certificate."""
    found = fair.write(tmp_path_factory.mktemp("made"), "attention", *public)
    issue.certify(found, schemes=FILE)
    return found


@pytest.fixture
def copied(made, tmp_path):
    return fair.copy(made, tmp_path)


def names(body):
    return {f["field"] for f in body["findings"]}


def test_it_is_issued_with_claims_groups_and_the_seven_fields(made, public):
    body = certificate.read(made.certificate)
    assert (body["verdict"], body["findings"], body["id"]) == ("issued", [], certificate.valid(made))
    (claim,) = body["claims"]
    assert (claim["contrast"], claim["n"], claim["word"]) == ("R1 - R0", 6, "better")
    assert claim["effect"] == pytest.approx(-0.103, abs=2e-3) and claim["interval"][0] < claim["effect"]
    assert len(body["groups"]) == 17 and all(body["groups"].values())
    p = body["published"]
    assert p["commit"] == public[1] and p["compile"] == "off" and len(p["tracker"]["bundle"]) == 64
    assert p["effective_batch"] == "12 micro x 1 accumulation x 1 ranks = 12 sequences of 64"
    assert p["time_per_method"]["R1"]["mean_s"] == 20.0 and p["hardware"]["model"] == "Test CPU"
    assert p["data"]["id"] == "synth" and p["data"]["preprocessing"]


def test_the_same_folder_gives_the_same_judgement(made):
    again = [{k: v for k, v in issue.judged(load.read(made), (), "quality").items() if k != "issued"} for _ in range(2)]
    assert again[0] == again[1]


# the public commit


def test_a_commit_on_no_branch_is_not_public(tmp_path):
    url, first = fair.repository(tmp_path / "public")
    folder = tmp_path / "public"
    (folder / "README").write_text("more\n")
    fair.git(folder, "commit", "-qam", "second")
    second = fair.git(folder, "rev-parse", "HEAD")
    assert _public.unreachable(url, {first: {}, second: {}}, FILE) == {}
    fair.git(folder, "reset", "-q", "--hard", first)
    fair.git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")  # a host that serves any commit by its name
    assert set(_public.unreachable(url, {first: {}, second: {}}, FILE)) == {second}
    fair.git(folder, "tag", "v1", second)
    assert _public.unreachable(url, {first: {}, second: {}}, FILE) == {}


@pytest.mark.parametrize(
    "remote", ["", "ssh://git@example.org/x", "https://user:secret@example.org/x", "http://example.org/x"]
)
def test_an_address_that_not_everybody_can_clone_is_refused(remote):
    assert _public.unreachable(remote, {"c" * 40: {}})


def test_source_that_git_was_told_to_overlook_is_not_public(tmp_path):
    url, commit = fair.repository(tmp_path / "public")
    assert _public.unreachable(url, {commit: fair.MODULES}, FILE) == {}
    why = _public.unreachable(url, {commit: fair.MODULES | {"ablab.train": "0" * 64}}, FILE)[commit]
    assert why == f"ablab.train of {commit[:12]} is not the source that ran"
    assert "ablab.data.more" in _public.unreachable(url, {commit: {"ablab.data.more": "0" * 64}}, FILE)[commit]


def test_without_network_it_is_refused_and_later_completed(tmp_path, public):
    found = fair.write(tmp_path, "attention", *public)
    body = issue.certify(found)  # https alone, so the address is refused as if it could not be reached
    assert names(body) == {"code.public"} and body["verdict"] == "refused"
    assert certificate.valid(found) is None
    assert issue.commit_only(found, schemes=FILE)["verdict"] == "issued"
    assert certificate.valid(found)


def test_completing_does_not_hide_another_finding(tmp_path, public):
    found = fair.write(tmp_path, "attention", *public)
    fair.change(found, lambda t: fair.put(t, "manifest.code.dirty", True), "R1")
    issue.certify(found)
    assert names(issue.commit_only(found, schemes=FILE)) == {"code.clean"}


def test_a_study_that_is_not_in_the_public_commit_is_refused(tmp_path, public):
    found = fair.write(tmp_path, "attention", *public, study=STUDY.replace("seeds 6", "seeds 6 "))
    body = issue.certify(found, schemes=FILE)
    assert "studies/ra.study of" in next(f["why"] for f in body["findings"] if f["field"] == "code.public")


def test_findings_taken_out_of_a_certificate_come_back(tmp_path, public):
    found = fair.write(tmp_path, "attention", *public)
    fair.change(found, lambda t: fair.put(t, "manifest.code.dirty", True), "R1")
    body = issue.certify(found, schemes=FILE)
    certificate.write(found.certificate, body | {"findings": [], "verdict": "issued"})
    assert names(issue.commit_only(found, schemes=FILE)) == {"code.clean"}


def test_a_stale_certificate_is_not_completed(tmp_path, public):
    found = fair.write(tmp_path, "attention", *public)
    issue.certify(found)
    fair.change(found, lambda t: fair.put(t, "summary.final.val_loss", 1.0), "R1", seeds=(1,))
    with pytest.raises(CertificateError, match="stale"):
        issue.commit_only(found, schemes=FILE)


def test_user_configuration_and_credentials_are_not_used(tmp_path, public, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text(f'[url "file://{tmp_path}/private"]\n\tinsteadOf = {public[0]}\n')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert _public.unreachable(public[0], {public[1]: fair.MODULES}, FILE) == {}


# tampering


@pytest.mark.parametrize("path", ["campaign.json", "journal.jsonl"])
def test_a_changed_file_makes_it_stale(copied, path):
    with open(copied.path / path, "a") as file:
        file.write("\n")
    assert certificate.valid(fair.Campaign.open(copied.path)) is None
    _, wrong = issue.recheck(copied.certificate)
    assert wrong == [f"{path}: is not what the certificate vouches for"]


def test_a_changed_result_that_done_vouches_for_is_seen(copied):
    fair.change(copied, lambda t: fair.put(t, "summary.final.val_loss", 1.0), "R1", seeds=(1,))
    _, wrong = issue.recheck(copied.certificate)
    assert any(w.endswith("summary.json: is not what the certificate vouches for") for w in wrong)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("claims.0.effect", -9.0),
        ("verdict", "refused"),
        ("published.commit", "d" * 40),
        ("groups.batch.0.status", "equal "),
    ],
)
def test_an_edited_certificate_is_refused(copied, where, value):
    body = json.loads(copied.certificate.read_text())
    at = body
    *keys, last = where.split(".")
    for key in keys:
        at = at[int(key) if isinstance(at, list) else key]
    at[last] = value
    copied.certificate.write_text(json.dumps(body))
    with pytest.raises(CertificateError):
        issue.recheck(copied.certificate)
    assert certificate.valid(copied) is None


def test_an_edited_certificate_with_a_new_id_is_judged_again(copied):
    body = json.loads(copied.certificate.read_text())
    body["claims"][0]["effect"] = -9.0
    body["id"] = certificate.identity(body)
    copied.certificate.write_text(json.dumps(body))
    assert issue.recheck(copied.certificate)[1] == ["claims: the files give another one"]


@pytest.mark.parametrize("key", ["signature", "id", "claims", "mirror", "extra"])
def test_the_schema_is_closed_and_all_but_the_signature_is_required(made, key):
    body = json.loads(made.certificate.read_text())
    assert not list(certificate.flaws(body))
    if key == "extra":
        body["extra"] = 1
    elif key == "mirror":
        del body["groups"]["mirror"]
    else:
        body.pop(key, None)
    assert bool(list(certificate.flaws(body))) == (key != "signature")


def test_a_signature_holds_for_its_content_only(copied, tmp_path):
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    body = issue.certify(copied, key=key, schemes=FILE)
    assert certificate.read(copied.certificate)["signature"] == body["signature"]
    body["published"]["commit"] = "d" * 40
    body["id"] = certificate.identity(body)
    copied.certificate.write_text(json.dumps(body))
    with pytest.raises(CertificateError, match="signature"):
        certificate.read(copied.certificate)


@pytest.mark.parametrize("fault", ["none", "stale", "edited", "moved"])
def test_the_banner_comes_back_on_every_page_once_it_does_not_hold(copied, fault, monkeypatch):
    if fault == "stale":
        with open(fair.trials(copied)[3].attempt(1).metrics, "a") as file:
            file.write(" ")
    if fault == "edited":
        copied.certificate.write_text(copied.certificate.read_text().replace("better", "Better", 1))
    if fault == "moved":  # a certificate of another campaign, whole as it is
        other = fair.write(copied.path.parent / "other")
        (other.report).mkdir(exist_ok=True)
        copied = shutil.copy(copied.certificate, other.certificate) and other
    read, times = certificate.read, []
    monkeypatch.setattr(certificate, "read", lambda path: times.append(1) or read(path))
    build(copied)
    assert len(times) == 1, "the inputs are hashed once for a report"
    figure = json.loads((copied.report / "loss_curves.json").read_text())
    assert (figure["certificate"] == "uncertified") == (fault != "none")
    seen = [copied.report / "report.md", copied.report / "report.html", *copied.report.glob("trials/*.html")]
    pages = [p.read_text() for p in seen] + [serve.Views(copied.path.parent).page(f"/c/{copied.name}/")]
    assert len(pages) == 15 and {page.BANNER in text for text in pages} == {fault != "none"}


# bundle and page


def test_a_bundle_is_judged_again_anywhere(made, tmp_path):
    one, two = (issue.bundle(made, tmp_path / name) for name in ("a.tar", "b.tar"))
    assert one.read_bytes() == two.read_bytes()
    body, wrong = issue.recheck(one)
    assert body["verdict"] == "issued" and wrong == []
    data = one.read_bytes().replace(b'"val_loss": 1.9', b'"val_loss": 1.8', 1)
    (tmp_path / "c.tar").write_bytes(data)
    assert issue.recheck(tmp_path / "c.tar")[1]


def test_without_a_certificate_there_is_no_bundle(copied, tmp_path):
    copied.certificate.unlink()
    with pytest.raises(CertificateError, match="make verify"):
        issue.bundle(copied, tmp_path / "x.tar")


def test_the_page_runs_nothing(tmp_path):
    hostile = "<img src=x onerror=alert(1)>"
    found = fair.write(tmp_path)
    fair.change(found, lambda t: fair.put(t, "manifest.software.torch", hostile))
    issue.certify(found)
    page = found.certificate.with_suffix(".html").read_text()
    assert hostile not in page and "&lt;img" in page and "script" not in page
    assert re.search(r"style-src 'sha256-[\w+/=]+'", page) and "default-src 'none'" in page


# claims and verbs


def test_a_claim_that_does_not_exist_is_an_error(made):
    with pytest.raises(RunError, match="CLAIM=R7: no such contrast"):
        issue.judged(load.read(made), ["R7"], "quality")


def test_too_few_seeds_and_a_word_that_decides_nothing_are_refused(tmp_path, public):
    found = fair.write(tmp_path, "attention", *public)
    for trial in fair.trials(found):
        if trial.record["seed"] > 2:
            trial.file("done").unlink()
    fields = names(issue.judged(load.read(found), (), "quality"))
    assert {"statistics.n", "statistics.decides", "statistics.verdict", "statistics.left_out"} <= fields


def test_the_verb_prints_every_finding_and_exits_3(tmp_path, capsys):
    found = fair.write(tmp_path, remote="https://localhost:1/none")
    fair.change(found, lambda t: fair.put(t, "manifest.batch.effective", 24), "R1")
    assert cli.main(["verify", f"CAMPAIGN={found.path}"]) == 3
    text = capsys.readouterr().out
    assert "REFUSED batch.effective (E): differs between R1 and R0" in text and "fix: " in text
    assert "REFUSED code.public" in text
    assert cli.main(["verify", f"CAMPAIGN={found.path}", "KIND=beauty"]) == 2
    assert cli.main(["verify", f"CAMPAIGN={found.path}", "CLAIM=R9"]) == 2
    assert cli.main(["verify", f"RECHECK={found.certificate}"]) == 3
    assert os.path.exists(found.certificate)
