"""`finetuner preview` shows the tokens that training would take, on the terminal and as a page that needs nothing."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.rows import RecipeWriter, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.cli import main
from finetuner.commands.preview_text import in_color, with_marks
from finetuner.data.preview import escape_invisible, token_runs
from finetuner.data.token_store import IGNORE_INDEX

EOS = "<|endoftext|>"
ROWS = [
    {"instruction": "Say <script>alert(1)</script>", "output": "two\n\tlines & <b>🦊</b>"},
    {"instruction": "Steer \x1b[31m the terminal", "output": "with \u202e and <|im_end|>"},
    {"instruction": "too long " * 40, "output": "for this"},
]


class Page(HTMLParser):
    """Its text, and whether every element that opens also closes."""

    VOID = ("meta", "input", "br", "rect", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


def recipe_of(write_recipe: RecipeWriter, folder: Path, **keys: object) -> Path:
    path = write_rows(folder / "preview.jsonl", ROWS)
    more = write_rows(folder / "more.jsonl", ROWS[:2] * 10)
    datasets = [{"path": str(path), "type": "alpaca"}, {"path": str(more), "type": "alpaca"}]
    return write_recipe(datasets=datasets, sequence_len=256, sample_packing=True, **keys)


def test_the_terminal_shows_what_is_learned_of_each_document(
    write_recipe: RecipeWriter, command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, out = command("preview", recipe_of(write_recipe, tmp_path), "-n", 2, "--source", 0)
    assert code == 0
    assert "⟦two⏎\n⇥lines & <b>🦊</b>‹<|endoftext|>›⟧" in out
    assert "⟦with \\u202e and <|im_end|>‹<|endoftext|>›⟧" in out, "a row's own special token is words"
    assert "\x1b" not in out
    assert "Steer ␛[31m the terminal" in out
    assert out.count("── source 0, document") == 2
    assert "3 rows, 2 documents" in out
    assert "1 longer than sequence_len" in out
    assert re.search(r"1 packs of 256 tokens, \d\d\.\d% full", out)


def test_marks_and_colors_say_what_the_labels_say(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "plain 🦊 ﷽ words " + EOS + " and more"
    ids = tokenizer(text)["input_ids"]
    for split in range(len(ids) + 1):
        labels = [IGNORE_INDEX] * split + ids[split:]
        for singly in (False, True):
            pieces = list(token_runs(ids, labels, tokenizer, singly=singly))
            assert [i for piece in pieces for i in piece.ids] == ids
            assert [i for piece in pieces if piece.trained for i in piece.ids] == ids[split:]
            assert [piece.text for piece in pieces if piece.special] == [EOS]
    split = ids.index(tokenizer.eos_token_id)
    pieces = list(token_runs(ids, labels := [IGNORE_INDEX] * split + ids[split:], tokenizer))
    marked = with_marks(iter(pieces), ids=False)
    learned = tokenizer.decode(ids[split:])
    assert re.sub("[⟦⟧‹›]", "", marked) == text
    assert re.sub("[‹›]", "", marked.split("⟦")[1].split("⟧")[0]) == learned
    colored = in_color(iter(pieces), ids=False)
    green = "".join(
        colored.plain[span.start : span.end] for span in colored.spans if str(span.style).startswith("bold")
    )
    assert (colored.plain, green) == (text, learned)
    numbered = with_marks(token_runs(ids, labels, tokenizer, singly=True), ids=True)
    assert [int(number) for number in re.findall(r"·(\d+)", numbered)] == ids


def test_nothing_that_cannot_be_seen_is_left_out() -> None:
    assert escape_invisible("a\r\n\t\0\x7f\u202e\u200bé🦊") == "a␍⏎\n⇥␀\\u007f\\u202e\\u200bé🦊"


def test_the_page_stands_alone_escapes_rows_and_has_the_numbers(
    write_recipe: RecipeWriter, command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    target = tmp_path / "page.html"
    code, out = command("preview", recipe_of(write_recipe, tmp_path), "-n", 3, "--html", target)
    assert code == 0
    assert f"done: {target}" in out.replace("\n", "")
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert {"script", "link", "img", "iframe", "b"}.isdisjoint(page.tags)
    assert not re.search(r"""(src|href)=|url\(|https?://|@import""", text)
    words = "".join(page.words)
    assert "Say <script>alert(" in re.sub(r"[\d·]", "", words)
    assert "prefers-color-scheme: dark" in text
    assert "sequence_len 256" in words
    assert "1 longer than sequence_len" in words
    learned = re.search(r"([\d,]+) tokens, of which ([\d,]+) are trained on \(([\d.]+)%\)", words)
    assert learned is not None
    tokens, trained = (int(learned[i].replace(",", "")) for i in (1, 2))
    assert abs(100 * trained / tokens - float(learned[3])) < 0.06
    shown_ids = re.findall(r'<span class="id">([\d·]+)</span>', text)
    assert len("·".join(shown_ids).split("·")) == sum(
        int(number.replace(",", "")) for number in re.findall(r"<p>source \d, document \d: ([\d,]+) tokens", text)
    )


def test_of_a_stream_only_the_rows_that_are_shown_are_read(
    write_recipe: RecipeWriter, command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    rows = [{"text": "one "}, {"text": "two " * 90}, {"text": "three "}, {"text": 4}]  # the last is an error
    path = write_rows(tmp_path / "texts.jsonl", rows)
    entry = {"path": str(path), "type": "completion"}
    recipe = write_recipe(datasets=[entry], streaming=True, max_steps=5, sequence_len=64, sample_packing=True)
    code, out = command("preview", recipe, "--rows", 3)
    assert code == 0
    assert out.count("── source 0, document") == 3, "none is too long to be cut into rows"
    assert "two two" in out
    assert "joined and cut into rows of 64 tokens" in out
    code, out = command("preview", recipe, "--rows", 4, "on_bad_row=skip")
    assert code == 0
    assert "4 rows, 3 documents" in out
    assert "1 that cannot become text" in out
    few = write_rows(tmp_path / "chats.jsonl", ROWS)
    streamed = [{"path": str(few), "type": "alpaca"}]
    code, out = command("preview", write_recipe(datasets=streamed, streaming=True, max_steps=5, sequence_len=256))
    assert code == 0
    assert "3 rows, 2 documents" in out, "to the end of the file, once"


def test_a_source_that_is_not_there_is_an_error_that_lists_those_that_are(
    write_recipe: RecipeWriter, command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, out = command("preview", recipe_of(write_recipe, tmp_path), "--source", 2)
    assert code == 2
    assert "there is no source 2" in out
    assert "0  " in out
    assert "more.jsonl" in out
    code, out = command("preview", recipe_of(write_recipe, tmp_path), "--html", tmp_path / "no" / "page.html")
    assert code == 2
    assert "cannot write" in out
