"""Prompts: from the world and from files, one split a prompt, one seed an image."""

import numpy as np
import pytest

from harvest.prompts import Prompt, image_seed, load_prompts, split_of
from harvest.shapes import draw


def test_captions_come_with_their_truth():
    prompts = load_prompts("shapes", 40, seed=1)
    assert len(prompts) == 40 and len({p.text for p in prompts}) > 30
    for prompt in prompts:
        assert prompt.labels["background"][0] in prompt.text
        for shape, colour in zip(prompt.labels["shape"], prompt.labels["colour"], strict=True):
            assert shape in prompt.text and colour in prompt.text
            assert (shape, colour) not in draw.HELD_OUT


def test_caption_i_depends_on_the_seed_and_i_only():
    few, many = load_prompts("shapes", 5, seed=3), load_prompts("shapes", 50, seed=3)
    assert many[:5] == few
    assert load_prompts("shapes", 5, seed=4) != few
    assert len(load_prompts("shapes")) == 1000


def test_lines_of_a_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeffa café\n\n  two cats \n", encoding="utf-8")
    assert load_prompts(str(path)) == [Prompt("a café", {}), Prompt("two cats", {})]
    assert [p.text for p in load_prompts(str(path), 3)] == ["a café", "two cats", "a café"]
    assert [p.text for p in load_prompts(str(path), 1)] == ["a café"]


def test_jsonl_with_labels(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a dog", "labels": {"animal": "dog", "colour": ["red", "blue"]}}\n'
        '\n{"prompt": "a sea"}\n'
    )
    assert load_prompts(str(path)) == [
        Prompt("a dog", {"animal": ["dog"], "colour": ["red", "blue"]}),
        Prompt("a sea", {}),
    ]


def test_csv_with_other_columns_as_labels(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('style,prompt\noil,"a dog, running"\n,a sea\n')
    assert load_prompts(str(path)) == [
        Prompt("a dog, running", {"style": ["oil"]}),
        Prompt("a sea", {}),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "at least one prompt"),
        ("p.md", "a dog", "a .txt, .jsonl or .csv file"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2 .* an object with a text 'prompt'"),
        ("p.jsonl", '{"prompt": "a"', "line 1 .*no JSON"),
        ("p.jsonl", '{"prompt": "a", "labels": {"n": 3}}', "labels that are texts"),
        ("p.jsonl", '{"prompt": "a", "labels": ["n"]}', "from attributes to values"),
        ("p.csv", "text\na\n", "a column 'prompt'"),
        ("p.csv", "prompt,x\na,1\n,2\n", "line 3"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / name))


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is there"):
        load_prompts(str(tmp_path / "no.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="UTF-8"):
        load_prompts(str(tmp_path / "b.txt"))


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
