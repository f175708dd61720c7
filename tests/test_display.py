"""What results look like where they are printed, and in a notebook."""

from html.parser import HTMLParser

import torch

from clipless_dp import fit, report, suggest_settings
from clipless_dp.display import Table
from clipless_dp.robustness import curve

from .support import gated_model, samples


class Cells(HTMLParser):
    """The texts of a page's cells and paragraphs; a tag that is not closed is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "p"):
            self.texts.append(data.strip())


def test_a_table_shows_the_same_cells_as_text_and_as_html():
    table = Table(("name", "Δ"), [("a", "1.50"), ("b", "–")], ("left", "right"), ["total 1.5"])
    assert Cells(table.html()).texts == ["name", "Δ", "a", "1.50", "b", "–", "total 1.5"]
    assert table.text().split() == ["name", "Δ", "------", "----", "a", "1.50", "b", "–", "total", "1.5"]


def test_cells_and_notes_cannot_write_markup():
    page = Table(("x",), [("<script>",)], ("left",), ["<b>&"]).html()
    assert Cells(page).texts == ["x", "<script>", "<b>&"]
    assert "<script>" not in page
    assert "<b>" not in page


def test_what_prints_as_a_table_is_one_in_a_notebook():
    torch.manual_seed(0)
    model = gated_model()
    inputs, labels = samples(100)
    shown = (
        model.sensitivity(),
        model.tightness((inputs, labels)),
        suggest_settings(model, 1000, 1.0, 1e-5),
        curve(model, (inputs, labels), [0.1]),
    )
    for result in shown:
        printed = str(result)
        for text in Cells(result._repr_html_()).texts:
            assert text in printed


def test_results_and_statements_are_shown_in_a_notebook():
    model = gated_model()
    result = fit(model, samples(60), epsilon=4.0, delta=1e-3, epochs=2, batch_size=30, progress=False)
    texts = Cells(result._repr_html_()).texts
    assert str(result) in texts
    assert texts.count(f"{result.epsilon:.4f}") == 1
    page = report(result.optimizer)._repr_html_()
    assert page.startswith("<iframe srcdoc=")
    assert "<h1>" not in page
