"""Prompts: from the world, files and data sets, each once; one split a prompt, one seed an image."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from harvest.prompts.prompts import (
    PromptList,
    image_seed,
    prompts_hash,
    read_prompts,
    split_of,
)
from harvest.prompts.readers import Prompt
from harvest.shapes import draw


def test_captions_come_with_their_truth():
    prompts = read_prompts("shapes", 40, seed=1).prompts
    assert len(prompts) == 40 and len({p.text for p in prompts}) > 30
    for prompt in prompts:
        assert prompt.labels["background"][0] in prompt.text
        for shape, colour in zip(prompt.labels["shape"], prompt.labels["colour"], strict=True):
            assert shape in prompt.text and colour in prompt.text
            assert (shape, colour) not in draw.HELD_OUT


def test_caption_i_depends_on_the_seed_and_i_only():
    few, many = (read_prompts("shapes", n, seed=3).prompts for n in (5, 50))
    assert many[:5] == few
    assert read_prompts("shapes", 5, seed=4).prompts != few
    assert len(read_prompts("shapes").prompts) == 1000


def test_lines_of_a_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeffa café\n\n  two cats \n", encoding="utf-8")
    assert read_prompts(str(path)).prompts == [Prompt("a café", {}), Prompt("two cats", {})]
    assert [p.text for p in read_prompts(str(path)).fill(3)] == ["a café", "two cats", "a café"]
    assert [p.text for p in read_prompts(str(path), 1).fill(1)] == ["a café"]


def test_jsonl_with_labels(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a dog", "labels": {"animal": "dog", "colour": ["red", "blue"]}}\n'
        '\n{"prompt": "a sea"}\n'
    )
    assert read_prompts(str(path)).prompts == [
        Prompt("a dog", {"animal": ["dog"], "colour": ["red", "blue"]}),
        Prompt("a sea", {}),
    ]


def test_csv_with_other_columns_as_labels(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('style,prompt\noil,"a dog, running"\n,a sea\n')
    assert read_prompts(str(path)).prompts == [
        Prompt("a dog, running", {"style": ["oil"]}),
        Prompt("a sea", {}),
    ]


def test_a_line_ends_where_the_file_says_so(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028dog"}\r\n{"prompt": "a sea"}', encoding="utf-8")
    assert [p.text for p in read_prompts(str(path)).prompts] == ["a\u2028dog", "a sea"]


def test_equal_prompts_are_kept_once_and_counted(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        'style,prompt\noil,"a dog,  running"\n,a sea\nink," a dog, running "\n,a  sea\n'
    )
    found = read_prompts(str(path))
    assert found.prompts == [Prompt("a dog,  running", {"style": ["oil"]}), Prompt("a sea", {})]
    assert (found.duplicates, found.blank) == (2, 0)
    assert found.note == "2 prompts (2 duplicates left out)"
    assert found.fill(5) == [*found.prompts * 2, found.prompts[0]]
    lower = tmp_path / "p.txt"
    lower.write_text("A dog\na dog\n")
    assert len(read_prompts(str(lower)).prompts) == 2


def test_no_more_is_read_than_is_needed(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "a "}\n{"prompt": "b"}\nno JSON')
    found = read_prompts(str(path), 2)
    assert [p.text for p in found.prompts] == ["a", "b"] and found.duplicates == 1
    with pytest.raises(ValueError, match="line 4"):
        read_prompts(str(path), 3)


def test_the_hash_is_of_the_texts_in_their_order(tmp_path):
    (tmp_path / "p.txt").write_text("a café\nb\na  café\n", encoding="utf-8")
    found = read_prompts(str(tmp_path / "p.txt"))
    found = prompts_hash([prompt.text for prompt in found.prompts])
    assert found == hashlib.sha256(b'["a caf\\u00e9","b"]').hexdigest()
    assert len({found, prompts_hash(["b", "a café"]), prompts_hash(['a café","b'])}) == 3


COLUMNS = {
    "p.csv": lambda name: f"x,{name}\n1,a dog\n",
    "p.jsonl": lambda name: f'{{"x": "1", "{name}": "a dog"}}\n',
}


@pytest.mark.parametrize("file", COLUMNS)
@pytest.mark.parametrize("name", ["caption", "text", "title"])
def test_the_column_can_be_named_and_two_are_found(tmp_path, file, name):
    (tmp_path / file).write_text(COLUMNS[file](name))
    source = str(tmp_path / file)
    assert [p.text for p in read_prompts(source, prompt_column=name).prompts] == ["a dog"]
    if name == "title":
        with pytest.raises(
            ValueError, match=r"a column 'prompt' in .*, got x, title; .*--prompt-c"
        ):
            read_prompts(source)
    else:
        assert [p.text for p in read_prompts(source).prompts] == ["a dog"]
    with pytest.raises(ValueError, match="a column 'other' in"):
        read_prompts(source, prompt_column="other")


def test_two_possible_columns_are_not_chosen_from(tmp_path):
    (tmp_path / "p.csv").write_text("text,caption\na,b\n")
    with pytest.raises(ValueError, match=r"a column 'prompt' in .*, got text, caption"):
        read_prompts(str(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_text("text,caption,prompt\na,b,c\n")
    assert [p.text for p in read_prompts(str(tmp_path / "p.csv")).prompts] == ["c"]


@pytest.fixture
def rows():
    return [
        {"prompt": "a dog", "labels": {"animal": ["dog"], "sky": None}, "seed": 3},
        {"prompt": None, "labels": {"animal": [], "sky": None}, "seed": 4},
        {"prompt": "a  sea", "labels": {"animal": None, "sky": "blue"}, "seed": 5},
        {"prompt": " a dog", "labels": None, "seed": 6},
        {"prompt": "a hill", "labels": None, "seed": 7},
        {"prompt": "  ", "labels": None, "seed": 8},
    ]


EXPECTED = PromptList(
    [
        Prompt("a dog", {"animal": ["dog"]}),
        Prompt("a  sea", {"sky": ["blue"]}),
        Prompt("a hill", {}),
    ],
    duplicates=1,
    blank=2,
)


def write_parquet(path, rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def test_parquet(tmp_path, rows):
    source = write_parquet(tmp_path / "p.parquet", rows)
    assert read_prompts(source) == EXPECTED
    assert EXPECTED.note == "3 prompts (1 duplicate and 2 blank rows left out)"
    assert read_prompts(source, 1).prompts == EXPECTED.prompts[:1]
    with pytest.raises(ValueError, match=r"column 'seed' to hold text, got int in row 1 of "):
        read_prompts(source, prompt_column="seed")
    with pytest.raises(ValueError, match=r"a column 'prompt' in .*t.parquet, got title"):
        read_prompts(write_parquet(tmp_path / "t.parquet", [{"title": "a"}]))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"expected .*bad.parquet to be a Parquet file"):
        read_prompts(str(tmp_path / "bad.parquet"))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_that_datasets_can_load(tmp_path, rows, offline, prefix):
    write_parquet(tmp_path / "set" / "train-0.parquet", rows[:3])
    write_parquet(tmp_path / "set" / "train-1.parquet", rows[3:])
    write_parquet(tmp_path / "set" / "test-0.parquet", [{**rows[0], "prompt": "a cat"}])
    source = f"{prefix}{tmp_path / 'set'}"
    assert read_prompts(source) == EXPECTED
    assert read_prompts(source, 2) == PromptList(EXPECTED.prompts[:2], 0, 1)
    assert [p.text for p in read_prompts(f"hf:{tmp_path / 'set'}:test").prompts] == ["a cat"]
    with pytest.raises(ValueError, match=r"a split 'dev' in .*, got train, test; .*set:train$"):
        read_prompts(f"hf:{tmp_path / 'set'}:dev")
    with pytest.raises(ValueError, match=r"a column 'other' in .*, got prompt, labels, seed"):
        read_prompts(source, prompt_column="other")


def test_a_data_set_of_text_whose_only_split_is_not_for_training(tmp_path, offline):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text('{"caption": "a dog"}\n{"caption": "a sea"}\n')
    assert [p.text for p in read_prompts(str(tmp_path / "set")).prompts] == ["a dog", "a sea"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"a data set of the hub.*none, got .*check its name"):
        read_prompts(str(tmp_path / "none"))


def fails_with(code, **environment):
    """The last line of the error that `code` ends with, in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("package", "source"), [("pyarrow", "p.parquet"), ("datasets", "hf:owner/name")]
)
def test_a_missing_package_is_named(tmp_path, package, source):
    (tmp_path / "p.parquet").write_bytes(b"")
    source = str(tmp_path / source) if source.startswith("p.") else source
    line = fails_with(
        f"import sys; sys.path[:0] = {sys.path!r}; sys.modules[{package!r}] = None\n"
        f"from harvest.prompts.prompts import read_prompts; read_prompts({source!r})"
    )
    assert f"needs the package {package}; run: pip install 'jaxdict[data]'" in line


@pytest.mark.parametrize("source", ["hf:owner/name", "owner/name"])
def test_a_hub_that_is_out_of_reach_is_one_line(source, tmp_path):
    pytest.importorskip("datasets")
    line = fails_with(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        f"from harvest.prompts.prompts import read_prompts; read_prompts({source!r})",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    assert line.startswith("ValueError: expected a data set of the hub")
    assert "owner/name" in line and "check its name and the network" in line


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "at least one prompt"),
        ("p.md", "a dog", r"a .txt, .jsonl, .csv, .tsv, .parquet or .json file, got the file"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2 .* an object with a text 'prompt'"),
        ("p.jsonl", '{"prompt": "a"', "line 1 .*no JSON"),
        ("p.jsonl", '{"prompt": 3}', "the column 'prompt' to hold text, got int in line 1"),
        (
            "p.jsonl",
            '{"prompt": "a", "labels": {"n": {"m": 3}}}',
            "labels that are texts or numbers",
        ),
        ("p.csv", "title\na\n", "a column 'prompt'"),
        ("p.csv", "prompt,x\n,1\n", "at least one prompt .*every row is blank"),
        ("p.csv", "prompt,x\na,1\nb, c,2\n", "at most 2 fields in line 3 .* got 3; put a prompt"),
        (
            "p.csv",
            'prompt,x\na,1\n"b,2\nc,3\n',
            "a row in line 3 .*a quote there that does not close",
        ),
        ("p.csv", 'prompt,x\n"a\nb",1\n"c" d,2\n', "a row in line 4 .*a quote there"),
        (
            "p.TSV",
            "prompt\tx\na\t1\t2\n",
            "at most 2 fields in line 2 .*TSV, as in its header, got 3",
        ),
        ("p.json", "[3]", "expected a list of objects or texts in .*json, .*got list"),
        ("p.jsonl", "1" * 5000, "line 1 .*Exceeds the limit"),
        ("p.jsonl", "[" * 100_000, "line 1 .*recursion"),
        (
            "p.json",
            '{"captions": []}',
            "or COCO captions, a list under 'annotations', got captions",
        ),
        ("p.json", '{"annotations": [{"id": 1}]}', "a column 'prompt' in annotation 1"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is there"):
        read_prompts(str(tmp_path / "no.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\x00a")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(str(tmp_path / "b.txt"))


def test_the_split_is_a_fixed_property_of_the_prompt():
    texts = [f"prompt {i}" for i in range(4000)]
    held = np.array([split_of(text, 0.2) for text in texts])
    assert abs(held.mean() - 0.2) < 0.02
    more = np.array([split_of(text, 0.4) for text in texts])
    assert (more >= held).all()  # a larger share only adds to what is held out
    assert not any(split_of(text, 0.0) for text in texts)
    assert [split_of("a red circle", share) for share in (0.1, 0.9)] == [0, 1]


def test_seeds_differ_between_images_and_runs():
    seeds = {image_seed(run, image) for run in range(50) for image in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**53 for seed in seeds)
    assert image_seed(3, 7) == image_seed(3, 7)
    assert image_seed(3, 7) != image_seed(7, 3)
