"""The report as JSON, page, Markdown and model card."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import deepclean_hooks as deepclean
from deepclean_hooks.data import batches
from deepclean_hooks.report import forgotten
from deepclean_hooks.report import rows as report_rows
from deepclean_hooks.report.verify import verify
from deepclean_hooks.tuning.gamma_sweep import gamma_sweep
from lab.planted import CLASSES, FORGET, RETAIN, TEST, gold, joined, original
from lab.reported import unlearned


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
    bad = "<script>alert(1)</script>\u202e\x1b[2J"
    layer = type(report.layers[0])(bad, 4, 2)
    replaced = {**vars(report), "layers": (layer,), "warnings": (bad,), "method": bad}
    text = type(report)(**replaced).to_html()
    assert "<script" not in text
    assert "&lt;script" in text
    assert all(line.isprintable() for line in text.splitlines())
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


MARKUP = {
    "html": "<img src=x onerror=alert(1)>",
    "line": "ok.\n\n## Verified\n\n- by the state",
    "link": "[click](https://example.org) https://example.org/x www.example.org",
    "image": "![](https://example.org/pixel.png)",
    "code": "`</code>` ```\nrm\n```",
    "table": "a | b | c",
    "emphasis": "**bold** _under_ ~~gone~~ @someone #1",
    "reader": "\u202eabc\u2028\x1b[2J",
}


@pytest.mark.parametrize("name", MARKUP)
def test_text_is_no_markup_in_markdown_and_card(report: deepclean.Report, name: str) -> None:
    """Fails if a setting, a warning, a method or an attack of a report can put markup, a link, a
    heading or a table cell into the Markdown of a model card."""
    bad = MARKUP[name]
    scores = copy.deepcopy(report.scores)
    scores["after"]["attacks"]["rmia"] |= {"feature": bad, "attacker": bad, "fitted_on": bad}
    altered = dataclasses.replace(
        report,
        method=bad,
        settings={"parameters": (bad,), bad: 1},
        criterion=bad,
        effect=bad,
        warnings=(bad,),
        scores=scores,
        versions={bad: bad},
    )
    for text, plain in (
        (altered.to_markdown(), report.to_markdown()),
        (altered.to_model_card(), report.to_model_card()),
    ):
        assert "<img" not in text
        assert not re.search(r"(?<!\\)\]\(|https?://|www\.|(?<!\\)\*\*bold", text)
        headings = [line for line in text.splitlines() if line.startswith("#")]
        assert headings == [line for line in plain.splitlines() if line.startswith("#")]
        assert text.count("```") == 2
        assert all(line.isprintable() for line in text.splitlines())
        cells = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
        assert cells == {7}


def test_class_is_scored_against_unseen_samples_of_the_class() -> None:
    """Fails if `forget_test=` of a session does not reach its scores."""
    found = unlearned(copy.deepcopy(original()), forget_test=TEST).scores["after"]
    assert "forget_test" in found["attacks"]["threshold_loss"]["fitted_on"]
    assert found["sets"]["forget_test"]["count"] == len(TEST)


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
    assert ("No weight was held: every weight was free to train." in text) == (not held)
    assert (f"The {held:,} other weights were held" in text) == bool(held)
    assert held == (0 if name in ("fine-tune", "random label", "fisher mask", "retrain") else held)
    wider = copy.deepcopy(told)
    for layer in wider["layers"]:
        layer["may_change"] = layer["selected"]
    wider["may_change_entries"] = report.selected_entries
    narrow = [check for check in verify(wider, model.state_dict(), before) if check.right is False]
    assert bool(narrow) == (report.may_change_entries > selected)


def test_report_of_a_larger_set_stays_small(report: deepclean.Report) -> None:
    """Fails if the report grows by outputs of single samples instead of counts."""
    scores = json.dumps(report.to_dict()["scores"])
    assert len(scores) < 120_000
    assert len(joined(FORGET, RETAIN)) > 500
