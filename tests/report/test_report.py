"""The report as JSON, page, Markdown and model card; and that `verify` believes no altered one."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import deepclean_hooks as deepclean
from deepclean_hooks.__main__ import main
from deepclean_hooks.data import batches
from deepclean_hooks.report import forgotten
from deepclean_hooks.report import rows as report_rows
from deepclean_hooks.report.verify import verify
from deepclean_hooks.tuning.gamma_sweep import gamma_sweep
from lab.planted import CLASSES, FORGET, RETAIN, TEST, WIDTH, gold, joined, original


class Tied(nn.Module):
    """A classifier with running statistics, a tied weight, and a buffer that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.again = self.first
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.again(torch.relu(self.first(x)))) * self.scale)


def unlearned(model: nn.Module, **options: Any) -> deepclean.Report:
    """A whole run with a short loop."""
    settings = {"test": TEST, "batch_size": 200, **options}
    method = deepclean.DeepClean(gamma=1.2)
    with deepclean.unlearning(
        model, forget=FORGET, retain=RETAIN, method=method, **settings
    ) as run:
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(RETAIN.tensors[0]), RETAIN.tensors[1]).backward()
            optimizer.step()
    return run.report


@pytest.fixture(scope="module")
def report() -> deepclean.Report:
    golds = [gold(seed) for seed in (10, 11, 12)]
    return unlearned(copy.deepcopy(original()), gold=golds)


def test_json_holds_everything_and_its_figures_are_those_of_evaluate(
    report: deepclean.Report,
) -> None:
    """Fails if a value of the report is no JSON, or its figures are not those of the evaluation."""
    told = json.loads(report.to_json())
    assert told == json.loads(json.dumps(report.to_dict()))
    assert told["schema"] == 3
    model = copy.deepcopy(original())
    found = deepclean.evaluate(model, forget=FORGET, retain=RETAIN, test=TEST, batch_size=200)
    assert told["scores"]["before"]["figures"] == pytest.approx(found.figures())


def test_forgotten_samples_are_named_by_salted_hashes_only(report: deepclean.Report) -> None:
    """Fails if a fingerprint, an index or an unsalted hash gets into the report."""
    told = report.to_json()
    first = [FORGET[i] for i in range(len(FORGET))]
    batch = torch.utils.data.default_collate(first)
    for fingerprint in batches.sample_ids(batch):
        assert str(fingerprint) not in told
        assert fingerprint.to_bytes(8, "little", signed=True).hex() not in told
    assert all(forgotten.among(report.forgotten, batch))
    others = torch.utils.data.default_collate([TEST[i] for i in range(50)])
    assert not any(forgotten.among(report.forgotten, others))
    again = unlearned(copy.deepcopy(original()), scores=False).forgotten
    assert again["salt"] != report.forgotten["salt"]
    assert not set(again["hashes"]) & set(report.forgotten["hashes"])


class Page(HTMLParser):
    """The tags that are open, and every tag and attribute seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_needs_no_network(report: deepclean.Report) -> None:
    """Fails if a tag is not closed, or the page loads a script, a style, a font or an image."""
    sweep = gamma_sweep(original(), FORGET, RETAIN, gammas=(1.0, 2.0, 5.0), test=TEST)
    page = Page()
    text = report.to_html(sweep.to_dict())
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert not any("src" in attrs or "href" in attrs for _, attrs in page.seen)
    assert "nan" not in re.findall(r'points="([^"]*)"', text)[0]
    # Two histograms, the ROC, the layers, and two curves of gamma (no fine-tune was asked for).
    assert sum(tag == "svg" for tag, _ in page.seen) == 6
    for words in (
        "What was asked",
        "What was done",
        "Did it work?",
        "What these figures do not show",
        "python -m deepclean_hooks verify",
        str(report.model_after),
        "none had changed",
        "retrained (mean of 3)",
        "within the spread",
    ):
        assert words in page.text


def test_methods_stand_side_by_side_with_their_gaps(report: deepclean.Report) -> None:
    """Fails if a method's figures land in another's row, or a gap is judged by another spread."""
    after = report.scores["after"]
    other = copy.deepcopy(after)
    other["figures"]["forget.accuracy"], other["gaps"]["forget.accuracy"] = 77.75, 66.25
    other["within_spread"]["forget.accuracy"] = False
    del other["figures"]["attack.rmia.auc"]
    rows = report_rows.compared({"DeepClean": after, "<other>": other})
    assert [row.label for row in rows["DeepClean"]] == [row.label for row in rows["<other>"]]
    by_label = {row.label: row for row in rows["<other>"]}
    assert by_label["Accuracy, forgotten data"].cells()[2:] == (
        "77.8 %",
        by_label["Accuracy, forgotten data"].cells()[3],
        "+66.2",
    )
    assert by_label["Told from new data (RMIA, AUC)"].after is None
    text = report.to_html(compared={"DeepClean": after, "<other>": other})
    table = text[text.index("The same request by other methods") :]
    table = table[: table.index("</table>")]
    assert "&lt;other&gt;" in table
    assert 'class="n bad" data-label="Accuracy, forgotten data">77.8 %<small>+66.2' in table
    assert table.count("<tr>") == 4
    assert "other methods" not in report.to_html()


def test_the_choice_of_gamma_is_told() -> None:
    """Fails if a page hides how gamma="auto" was settled, or tells of a choice where gamma was
    given."""
    run = deepclean.Session(
        original(), deepclean.DeepClean(gamma="auto", held_out=TEST), scores=False
    )
    run.measure(FORGET, RETAIN)
    with pytest.warns(UserWarning, match="still better known than unseen"):
        chosen = run.select()
    gamma = f"{chosen.gamma_choice['gamma']:g}"
    words = f"gamma = {gamma} was chosen out of 1, 1.1, 1.5, 2, 3, 5, 10 without test data"
    assert words in chosen.to_markdown()
    page = chosen.to_html()
    assert words in page
    assert f"<b>{gamma}</b> (chosen)" in page
    assert "chosen without test data" in str(chosen)
    assert json.loads(chosen.to_json())["gamma_choice"] == chosen.gamma_choice
    given = deepclean.Session(original(), deepclean.DeepClean(), scores=False).report
    assert "chosen" not in given.to_html()


def test_names_are_text_and_no_markup(report: deepclean.Report) -> None:
    """Fails if a layer or a warning can put markup into the page."""
    bad = "<script>alert(1)</script>"
    layer = type(report.layers[0])(bad, 4, 2)
    replaced = {**vars(report), "layers": (layer,), "warnings": (bad,), "method": bad}
    text = type(report)(**replaced).to_html()
    assert "<script" not in text
    assert "&lt;script" in text
    assert "<script" not in type(report)(**replaced).to_markdown()


def test_pages_of_unfinished_and_unscored_runs() -> None:
    """Fails if a phase that has not happened, or scores that were not computed, break the page."""
    run = deepclean.Session(copy.deepcopy(original()), deepclean.DeepClean(), scores=False)
    for text in (run.report.to_html(), run.report.to_markdown(), run.report.to_model_card()):
        assert "not finished" in text or "not scored" in text
    run.measure(FORGET, RETAIN)
    preview = run.select()
    assert "This run is not finished" in preview.to_html()
    lone = unlearned(copy.deepcopy(original()), gold=gold())
    assert "one retrained model" in lone.to_html()
    none = unlearned(copy.deepcopy(original()))
    assert "No model retrained without the forgotten data was given" in none.to_html()


def test_markdown_and_model_card_say_what_the_page_says(report: deepclean.Report) -> None:
    """Fails if the table's columns are torn, or a caveat is left out of the model card."""
    text, card = report.to_markdown(), report.to_model_card()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) > 8
    assert {line.count("|") for line in table} == {7}
    assert card.startswith("## Unlearning\n")
    for words in ("Copies made earlier", str(report.model_after), "verify report.json"):
        assert words in text
        assert words in card


def test_class_is_scored_against_unseen_samples_of_the_class() -> None:
    """Fails if `forget_test=` of a session does not reach its scores."""
    found = unlearned(copy.deepcopy(original()), forget_test=TEST).scores["after"]
    assert "forget_test" in found["attacks"]["threshold_loss"]["fitted_on"]
    assert found["sets"]["forget_test"]["count"] == len(TEST)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with report.json and the checkpoints before and after, of a model with BatchNorm."""
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    model = Tied()
    torch.save(model.state_dict(), folder / "before.pt")
    told = unlearned(model)
    (folder / "report.json").write_text(told.to_json(), encoding="utf-8")
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "after.pt")
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(wrapped, folder / "wrapped.pt")
    once = {n: v.contiguous() for n, v in model.state_dict().items() if not n.startswith("first")}
    save_file(once, folder / "after.safetensors")
    return folder


@pytest.mark.parametrize("name", ["after.pt", "wrapped.pt", "after.safetensors"])
def test_verify_accepts_the_model_of_the_report(
    stored: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a checkpoint of the very model is refused: wrapped, nested, or with a tied tensor
    stored once, and without the buffer that no checkpoint holds."""
    given = [str(stored / "report.json"), str(stored / name)]
    assert main(["verify", *given]) == 0
    assert main(["verify", *given, "--original", str(stored / "before.pt")]) == 0
    told = capsys.readouterr().out
    assert " checks hold, 1 skipped" in told  # without the original what changed is not known
    assert re.search(r"\d+ checks hold$", told.strip())


METHODS = {
    "fine-tune": deepclean.FineTune(),
    "ssd": deepclean.SSD(alpha=2),
    "random label": deepclean.RandomLabel(),
    "salun": deepclean.SalUn(),
    "fisher mask": deepclean.FisherMask(CLASSES, share=0.1),
    "retrain": deepclean.Retrain(),
}


@pytest.mark.filterwarnings("ignore:.*reset entries are dead|.*candidate entry was selected")
@pytest.mark.parametrize("name", METHODS)
def test_the_page_says_what_the_method_did(name: str) -> None:
    """Fails if the page tells of a reset, or of weights that were held, where there were none, or
    `verify` refuses the genuine report of a method that trains more than it selects."""
    model, method = copy.deepcopy(original()), METHODS[name]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = deepclean.unlearn(
        model, FORGET, RETAIN, method=method, epochs=1, scores=False, batch_size=200
    )
    told = report.to_dict()
    assert all(check.right is not False for check in verify(told, model.state_dict(), before))
    text = report.to_html() + report.to_markdown()
    selected, held = report.selected_entries, report_rows.frozen(told)
    assert ("No weight was selected." in text) == (not selected)
    assert (f"were selected and {method.effect}." in text) == bool(selected)
    assert ("No weight was held: every one was free to train." in text) == (not held)
    assert (f"The {held:,} other weights were held" in text) == bool(held)
    assert held == (0 if name in ("fine-tune", "random label", "fisher mask", "retrain") else held)
    wider = copy.deepcopy(told)
    for layer in wider["layers"]:
        layer["may_change"] = layer["selected"]
    wider["may_change_entries"] = report.selected_entries
    narrow = [check for check in verify(wider, model.state_dict(), before) if check.right is False]
    assert bool(narrow) == (report.may_change_entries > selected)


def test_verify_refuses_an_unfinished_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if what the Trainer writes before it trains passes for any model."""
    run = deepclean.Session(Tied(), deepclean.DeepClean(gamma=1.2), scores=False)
    run.measure(FORGET, RETAIN).select()
    run.reset()
    (tmp_path / "report.json").write_text(run.report.to_json(), encoding="utf-8")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "any.pt")
    assert main(["verify", str(tmp_path / "report.json"), str(tmp_path / "any.pt")]) == 1
    told = capsys.readouterr().out
    assert "MISMATCH the run is finished: reset" in told
    assert "MISMATCH tensors of the unlearned model: the report has no digests of them" in told


def test_verify_reads_a_tied_tensor_under_either_name(stored: Path) -> None:
    """Fails if a tied weight that was reset counts as one that nobody may touch, or an altered one
    passes because its other name is unchanged."""
    told = json.loads((stored / "report.json").read_text(encoding="utf-8"))
    before, after = (torch.load(stored / f"{n}.pt", weights_only=True) for n in ("before", "after"))
    after = after["model"]
    del before["again.weight"], after["first.weight"]
    assert all(check.right for check in verify(told, after, before))
    after["again.weight"].view(-1)[0] += 1
    assert not all(check.right for check in verify(told, after, before))


def altered_weight(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    after["head.weight"].view(-1)[0] += 1e-6


def missing_tensor(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    del after["head.bias"]


def other_tensor(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    after["adapter.weight"] = torch.ones(2)


def fewer_selected(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["selected_entries"] -= 1


def better_fraction(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["selected_fraction"] *= 0.9


def fewer_forgotten(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["forgotten"]["hashes"].pop()


def nicer_layer(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    largest = max(report["layers"], key=lambda layer: layer["selected"])
    other = next(one for one in report["layers"] if one is not largest)
    moved = largest["selected"]
    largest["selected"], other["selected"] = 0, other["selected"] + moved


def freer_layer(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["layers"][0]["may_change"] = report["layers"][0]["entries"]


def other_schema(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["schema"] = 99


def moved_entry(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["frozen_entries_moved"] = 3


ALTERATIONS = [
    altered_weight,
    missing_tensor,
    other_tensor,
    fewer_selected,
    better_fraction,
    fewer_forgotten,
    nicer_layer,
    freer_layer,
    other_schema,
    moved_entry,
]


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
def test_verify_refuses_what_was_altered(
    stored: Path, tmp_path: Path, alter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a report or a model that was touched afterwards passes."""
    told = json.loads((stored / "report.json").read_text(encoding="utf-8"))
    state = torch.load(stored / "after.pt", weights_only=True)["model"]
    alter(told, state)
    (tmp_path / "report.json").write_text(json.dumps(told), encoding="utf-8")
    torch.save(state, tmp_path / "after.pt")
    given = [str(tmp_path / "report.json"), str(tmp_path / "after.pt")]
    assert main(["verify", *given, "--original", str(stored / "before.pt")]) == 1
    assert "MISMATCH" in capsys.readouterr().out


def test_verify_recomputes_gaps(report: deepclean.Report) -> None:
    """Fails if a figure of the final scores can be made nicer without its gap."""
    told = json.loads(report.to_json())
    state = copy.deepcopy(original()).state_dict()

    def gaps() -> bool | None:
        checks = {check.what: check.right for check in verify(told, state)}
        return checks["gaps are figure minus gold"]

    assert gaps()
    told["scores"]["after"]["figures"]["forget.accuracy"] -= 10
    assert gaps() is False


def test_verify_names_what_it_cannot_read(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a missing or damaged file ends in a traceback or in exit status 0."""
    given = str(stored / "report.json")
    assert main(["verify", given, str(tmp_path / "none.pt")]) == 2
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    assert main(["verify", given, str(tmp_path / "bad.pt")]) == 2
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    assert main(["verify", str(tmp_path / "list.json"), str(stored / "after.pt")]) == 2
    (tmp_path / "torn.json").write_text("{", encoding="utf-8")
    assert main(["verify", str(tmp_path / "torn.json"), str(stored / "after.pt")]) == 2
    told = capsys.readouterr()
    assert told.err.count("cannot verify") == 4
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert main(["verify", given, str(tmp_path / "empty.pt")]) == 2
    assert "holds no state_dict" in capsys.readouterr().err


def test_report_of_a_larger_set_stays_small(report: deepclean.Report) -> None:
    """Fails if the report grows by outputs of single samples instead of counts."""
    scores = json.dumps(report.to_dict()["scores"])
    assert len(scores) < 120_000
    assert len(joined(FORGET, RETAIN)) > 500
