"""Readers of prompts: files as people have them, and one rule for blanks and labels in all of them."""

import csv
import json

import pytest

from harvest.prompts.prompts import read_prompts
from harvest.prompts.readers import Prompt


def texts(path):
    return [prompt.text for prompt in read_prompts(str(path)).prompts]


def write_rows(path, rows):
    """The same prompts and labels in each kind of file."""
    if path.suffix == ".jsonl":
        lines = [json.dumps({"prompt": p, "labels": {"n": n}}) for p, n in rows]
        path.write_text("\n".join(lines))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = {"prompt": [p for p, _ in rows], "labels": [{"n": n} for _, n in rows]}
        parquet.write_table(pyarrow.table(table), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([("prompt", "n"), *((p or "", n) for p, n in rows)])


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.tsv", "p.parquet"])
def test_blank_prompts_are_counted_and_numbers_are_labels_in_every_kind_of_file(tmp_path, name):
    rows = [("a red, solid circle", 1), ("", 2), (None, 3), ('a "blue" ring\tor two', 4), (" ", 5)]
    write_rows(tmp_path / name, rows)
    found = read_prompts(str(tmp_path / name))
    assert found.prompts == [
        Prompt("a red, solid circle", {"n": ["1"]}),
        Prompt('a "blue" ring\tor two', {"n": ["4"]}),
    ]
    assert found.blank == 3 and "3 blank rows left out" in found.note


def test_blank_lines_of_a_text_file_are_counted(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n\n  \na cat\n")
    found = read_prompts(str(tmp_path / "p.txt"))
    assert [p.text for p in found.prompts] == ["a dog", "a cat"] and found.blank == 2


@pytest.mark.parametrize("labels", [3, [1, 2], "red", None])
def test_labels_that_are_no_object_are_left_alone(tmp_path, labels):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a dog", "labels": labels}))
    assert read_prompts(str(tmp_path / "p.jsonl")).prompts == [Prompt("a dog", {})]


def test_a_tab_separated_file_with_a_capital_header_and_suffix(tmp_path):
    path = tmp_path / "parti.TSV"
    path.write_text("Prompt\tCategory\tNote\na red circle\tAbstract\t\na ring, blue\tArts\tx\t\n")
    assert read_prompts(str(path)).prompts == [
        Prompt("a red circle", {"Category": ["Abstract"]}),
        Prompt("a ring, blue", {"Category": ["Arts"], "Note": ["x"]}),
    ]


def test_coco_captions(tmp_path):
    annotations = [
        {"id": 1, "image_id": 7, "caption": "A red kite."},
        {"id": 2, "image_id": 7, "caption": "  "},
        {"id": 3, "image_id": 9, "caption": "Two blue cups."},
    ]
    content = json.dumps({"images": [], "annotations": annotations})
    (tmp_path / "captions.json").write_text(content, encoding="utf-8-sig")
    found = read_prompts(str(tmp_path / "captions.json"))
    assert [p.text for p in found.prompts] == ["A red kite.", "Two blue cups."]
    assert found.blank == 1


def test_a_field_may_be_long_and_a_quoted_one_may_hold_lines(tmp_path):
    long = "x" * 140_000
    (tmp_path / "p.csv").write_text(f'prompt,notes\na dog,{long}\n"a cat,\n""striped""",short\n')
    found = read_prompts(str(tmp_path / "p.csv"))
    assert [p.text for p in found.prompts] == ["a dog", 'a cat,\n"striped"']
    assert found.prompts[0].labels == {"notes": [long]}


def test_a_file_that_is_there_is_never_taken_for_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("a dog")
    with pytest.raises(ValueError, match=r"COCO \.json file, got the file owner/name; convert it"):
        read_prompts("owner/name")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a dog\n")
    assert texts("~/p.txt") == ["a dog"]
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a cat"}\n')
    assert texts("~/folder") == ["a cat"]
