"""Libraries are quiet while a model loads and runs; what matters of what they say is told in one line of ours."""

import io
import logging
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from harvest.config import HarvestConfig
from harvest.models import cut_prompts, load_model
from harvest.models.files import EMBEDDED
from harvest.models.parts import MODELS, load_parts
from harvest.models.quiet import logged, quiet
from harvest.run import harvest

LONG = "a large red circle on the left of the picture " * 10


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def weights_of(folder, part):
    return next((folder / part).glob("*.safetensors"))


def change(path, edit):
    weights = load_file(path)
    edit(weights, sorted(weights)[3])
    save_file(weights, path, {"format": "pt"})


def remove(weights, key):
    del weights[key]


def rename(weights, key):
    weights[f"other.{key}"] = weights.pop(key)


def reshape(weights, key):
    weights[key] = torch.zeros(3)


@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize("edit", [remove, rename])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_weights_that_would_be_random_are_refused(folder, part, edit, quantize):
    path = weights_of(folder, part)
    key = sorted(load_file(path))[3]
    change(path, edit)
    with pytest.raises(ValueError, match=rf"1 weights of {part} are not in its files") as caught:
        load_model(str(folder), device="cpu", quantize=quantize)
    assert key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", MODELS)
def test_weights_of_other_shapes_are_refused(folder, part):
    change(weights_of(folder, part), reshape)
    with pytest.raises(ValueError, match="shape"):
        load_model(str(folder), device="cpu")


def test_tied_weights_are_not_missing(folder):
    path = weights_of(folder, "text_encoder_2")
    names = set(load_file(path))
    model = load_parts(folder, ["text_encoder_2"], dtype=torch.float32, quantize={})
    assert set(model["text_encoder_2"].state_dict()) > names


@pytest.mark.parametrize("parts", ["all", "text", "image", "none"])
def test_nothing_is_shown_while_a_folder_loads(folder, parts, capfd, recwarn):
    load_model(str(folder), device="cpu", parts=parts)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_one_bar_of_ours_is_shown_on_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    load_model(str(folder), device="cpu")
    said = capsys.readouterr().err
    assert f"loading {folder}:" in said and "0/4" in said  # how often it moves depends on the time
    assert "Loading" not in said
    load_model("shapes", device="cpu")
    assert capsys.readouterr().err == ""


def test_lines_and_warnings_go_to_the_log(folder, caplog, capfd):
    change(weights_of(folder, "text_encoder"), remove)
    with quiet():
        CLIPTextModel.from_pretrained(str(folder / "text_encoder"))
        warnings.warn("of a library", FutureWarning, stacklevel=1)
    assert "MISSING" in caplog.text and "FutureWarning: of a library" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_afterwards_libraries_say_what_they_did_before():
    log = logging.getLogger("transformers")
    before, show = (list(log.handlers), log.propagate), warnings.showwarning
    with pytest.raises(KeyError), quiet():
        assert log.propagate and log.handlers != before[0]
        raise KeyError
    with logged():
        pass
    assert (list(log.handlers), log.propagate) == before and warnings.showwarning is show


def test_cut_prompts_are_counted(embedded):
    assert cut_prompts(embedded, ["a blue star", "a red circle"]) is None
    line = cut_prompts(embedded, [LONG, "a blue star", "a red circle " * 14])
    assert line is not None and "1 of 3 prompts are longer than 77 tokens, and CLIP" in line
    assert "2 of 3 prompts are longer than 32 tokens, and T5" in line
    assert "--max-sequence-length" in line and "\n" not in line
    line = cut_prompts(embedded, [LONG * 5], 512)
    assert line is not None and "longer than 512 tokens" in line
    assert "--max-sequence-length" not in line


def test_the_last_token_that_fits_is_not_cut(embedded):
    tokens = len(embedded.pipe.tokenizer_2(LONG)["input_ids"])
    told = [cut_prompts(embedded, [LONG], length) or "" for length in (tokens - 1, tokens)]
    assert ["T5" in line for line in told] == [True, False]


def test_libraries_do_not_print_what_was_cut(embedded, caplog):
    shown = logging.StreamHandler(io.StringIO())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for log in loggers:
        log.addHandler(shown)
    embedded.encode([LONG])
    embedded.generate([LONG], [0], steps=1)
    for log in loggers:
        log.removeHandler(shown)
    assert shown.stream.getvalue() == "" and "truncated" in caplog.text


def test_harvest_tells_once_that_prompts_are_cut(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{LONG}\na blue star\n")
    config = HarvestConfig(out=tmp_path / "store", prompts=str(prompts), images=2, dry_run=True)
    harvest(config)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("note: 1 of 2 prompts are longer than 77 tokens")
