"""Sizes that no machine has room for are refused by their flag, before anything is loaded or made."""

import re
from pathlib import Path

import pytest

from jaxdict import cli

HUGE = "999999999999"
STEER = ("steer", "--dictionary", "dictionary", "--feature", "1", "--prompt", "a circle")
STEER_EVAL = (
    *("steer-eval", "--dictionary", "dictionary", "--feature", "1"),
    *("--prompts", "shapes", "--wanted", "colour=blue"),
)
PICTURE = ("height", "width")
SIZES = {
    ("harvest",): ("images", "batch", "steps", *PICTURE),
    STEER: ("num-steps", *PICTURE),
    STEER_EVAL: ("images", "selection", "batch", "num-steps", *PICTURE),
}


@pytest.mark.parametrize(
    ("words", "flag"), [(words, flag) for words, flags in SIZES.items() for flag in flags]
)
def test_a_size_without_room_names_its_flag_and_what_it_would_take(
    words: tuple[str, ...], flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    said = rf"^--{flag}: expected what fits .* would take \d.*, got {HUGE}; lower --{flag}"
    with pytest.raises(ValueError, match=said) as refused:
        cli.call([*words, "--out", "out/deep", f"--{flag}", HUGE])
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("harvest",), STEER, STEER_EVAL])
def test_a_text_longer_than_the_encoder_takes_is_refused_by_its_flag(words: tuple[str, ...]):
    said = re.escape(f"--max-sequence-length: expected 0 to 512 tokens, got {HUGE}")
    with pytest.raises(ValueError, match=f"^{said}"):
        cli.call([*words, "--out", "out", "--max-sequence-length", HUGE])
