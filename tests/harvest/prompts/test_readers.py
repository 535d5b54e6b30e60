"""Readers of prompts: files as people have them, and one rule for blanks and labels in all of them."""

import csv
import hashlib
import json

import pytest

from harvest.prompts.prompts import read_prompts, split_of
from harvest.prompts.readers import Prompt
from harvest.prompts.text import canonical


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
    with pytest.raises(ValueError, match=r"or \.json file, got the file owner/name; convert it"):
        read_prompts("owner/name")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a dog\n")
    assert texts("~/p.txt") == ["a dog"]
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a cat"}\n')
    assert texts("~/folder") == ["a cat"]


LINES = ["a café in Zürich", "犬と猫", "a\u2028dog\x0cruns\x85far", "क्षि 🐕\u200d🦺"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.json"])
def test_encodings_line_ends_and_scripts(tmp_path, name, encoding, end):
    lines = {
        "p.txt": LINES,
        "p.jsonl": [json.dumps({"prompt": line}, ensure_ascii=False) for line in LINES],
        "p.csv": ["prompt", *LINES],
        "p.json": [
            "[",
            *(json.dumps(line) + "," for line in LINES[:-1]),
            json.dumps(LINES[-1]),
            "]",
        ],
    }[name]
    (tmp_path / name).write_bytes(end.join(lines).encode(encoding))
    assert texts(tmp_path / name) == LINES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a café".encode("latin-1"), r"UTF-8 text, .* at byte 5 \(0xe9"),
        ("a dog".encode("utf-16-le"), "a NUL character in line 1"),
        ("a dog".encode("utf-32"), "got UTF-32; save it as UTF-8"),
        (b"\xff\xfea\x00b", "UTF-16 text, .* at byte 4"),
        (b"a dog\0", "a NUL character in line 1"),
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.json"])
def test_another_encoding_is_told_by_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_prompts(str(tmp_path / name))
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_wrong_byte_far_into_a_file_is_told_by_its_place_in_the_file(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a dog\n" * 20_000 + "a café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"UTF-8 text, .* at byte 120005 \(0xe9"):
        read_prompts(str(tmp_path / "p.txt"))


def test_half_a_surrogate_pair_is_told_by_its_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a \\ud83d\\udc15"}\n{"prompt": "a \\ud83d dog"}\n')
    with pytest.raises(
        ValueError, match=r"line 2 of .*surrogate pair \(U\+D83D\) at its character 2"
    ):
        read_prompts(str(path))
    path.write_text('{"prompt": "a \\ud83d\\udc15", "labels": {"n": "\\ud83d"}}\n')
    with pytest.raises(ValueError, match="labels that are texts or numbers"):
        read_prompts(str(path))


SAME = [
    "a café  by\tnight",
    "a cafe\u0301 by night",
    " a\u3000café by\u00a0night\u2028",
    "a café\u200b by night\ufeff",
]


def test_texts_that_are_one_prompt_are_read_once_and_in_one_split(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*SAME, "\u200b \ufeff"])))
    found = read_prompts(str(tmp_path / "p.jsonl"))
    assert (texts(tmp_path / "p.jsonl"), found.duplicates, found.blank) == (SAME[:1], 3, 1)
    assert len(read_prompts(str(tmp_path / "p.jsonl"), repeats=True).prompts) == 4
    for number in range(40):
        assert len({split_of(f"{text} {number}", 0.5) for text in SAME}) == 1
    assert canonical("क्\u200dष") != canonical("क्ष")  # a joiner of no width that can be seen


def test_the_split_of_a_text_in_plain_form_is_that_of_its_own_hash():
    for number in range(200):
        text = f"a red circle, {number}"
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        assert split_of(text, 0.2) == (share < 0.2)
