from __future__ import annotations

import dataclasses
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from harvest.store import StoreSpec, create_store
from interp.config import IndexConfig, ReportConfig
from interp.index.arrays import load_index
from interp.index.build import build_index
from interp.report import charts
from interp.report.pages import kind_name
from interp.report.report import choose_features, write_report
from jaxdict.dictionary import ENCODER_KINDS

VOID = {"meta", "img", "link", "br", "input", "hr", "line", "rect", "path"}


class Page(HTMLParser):
    """Every tag, link, id and text of a page; checks that tags nest."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.file, self.tags, self.links, self.ids, self.text = file, [], [], [], []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.attributes.append((tag, found))
        self.links += [
            found[name] for name in ("href", "src", "srcset", "action") if found.get(name)
        ]
        if "id" in found:
            self.ids.append(found["id"])
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module", params=["sae_img", "itda", "sae_txt"])
def report(world, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build_index(
        IndexConfig(
            dictionary=world.root / request.param,
            store=world.root / "store",
            out=folder / "index",
            split="all",
        )
    )
    config = ReportConfig(index=folder / "index", out=folder / "report", size=64)
    return request.param, write_report(config), config.out


def pages(folder: Path) -> list[Page]:
    return [Page(file) for file in sorted(folder.rglob("*.html"))]


def test_every_link_stays_inside_and_resolves(report):
    _, summary, folder = report
    found = pages(folder)
    assert len(found) == summary["pages"] + 1 > 7
    used = set()
    for page in found:
        assert len(set(page.ids)) == len(page.ids)
        for link in page.links:
            parts = urlsplit(link)
            assert not parts.scheme and not parts.netloc, link
            if not parts.path:
                assert parts.fragment in page.ids
                continue
            target = (page.file.parent / unquote(parts.path)).resolve()
            assert target.is_file() and target.is_relative_to(folder.resolve()), link
            used.add(target)
    written = {file.resolve() for file in folder.rglob("*") if file.is_file()}
    assert written - used <= {folder.resolve() / "index.html", folder.resolve() / "report.json"} | {
        # shared pictures of images that only a source page or a text page shows
        file.resolve() for file in (folder / "assets" / "pictures").iterdir()
    }  # fmt: skip


def test_nothing_is_fetched_from_the_network(report):
    for page in pages(report[2]):
        source = page.file.read_text(encoding="utf-8")
        assert "@import" not in source and "url(" not in source
        for tag, attributes in page.attributes:
            assert tag not in ("link", "iframe", "object", "embed", "base")
            assert not (tag == "script" and attributes.get("src"))
            assert not any(name.startswith("on") for name in attributes)


def test_prompts_are_escaped(world, report):
    """A prompt that is markup shows up as text, and makes no tag."""
    kind, _, folder = report
    texts, scripts = "", 0
    for page in pages(folder):
        texts += "".join(page.text)
        scripts = max(scripts, page.tags.count("script"))
        assert "<script>alert" not in page.file.read_text()
        images = [dict(a).get("src", "") for tag, a in page.attributes if tag == "img"]
        assert all("evil" not in (src or "") for src in images)
    assert scripts == 1
    if kind != "sae_txt":
        assert world.store.prompts[0] in texts


def test_pages_are_accessible(report):
    for page in pages(report[2]):
        assert page.tags.count("h1") == 1 and page.tags.count("main") == 1
        assert any(tag == "html" and a.get("lang") == "en" for tag, a in page.attributes)
        for tag, attributes in page.attributes:
            if tag == "img":
                assert attributes["alt"] and attributes["width"] and attributes["height"]
            if tag == "svg":
                assert attributes["role"] == "img" and attributes["aria-label"]


def test_overview_shows_every_page_and_the_numbers(report):
    _, _, folder = report
    overview = Page(folder / "index.html")
    cards = [a for tag, a in overview.attributes if tag == "li" and "data-id" in a]
    files = {file.stem for file in (folder / "features").iterdir()}
    assert {card["data-id"] for card in cards} == files
    text = " ".join("".join(overview.text).split())
    index = load_index(folder.parent / "index")
    for name, attribute in index.facts["summary"]["attributes"].items():
        assert name in text and f"median {attribute['median_auroc']:.2f}" in text
    assert f"{index.m:,}" in text and "planted" in text


def test_neighbours_follow_the_order(report):
    folder = report[2]
    index = load_index(folder.parent / "index")
    order = [int(feature) for feature in index.order if index.alive[feature]]
    for place, feature in enumerate(order):
        page = Page(folder / "features" / f"{feature}.html")
        links = {a.get("id"): a["href"] for tag, a in page.attributes if tag == "a"}
        before = f"{order[place - 1]}.html" if place else None
        after = f"{order[place + 1]}.html" if place + 1 < len(order) else None
        assert (links.get("previous"), links.get("next")) == (before, after)


def test_heat_strip_has_a_tile_for_each_example(report):
    kind, _, folder = report
    index = load_index(folder.parent / "index")
    for file in (folder / "features").iterdir():
        feature = int(file.stem)
        examples = index.examples(feature)
        strip = folder / "assets" / "heat" / f"{feature}.webp"
        assert strip.exists() == (kind != "sae_txt")
        if strip.exists():
            assert Image.open(strip).size == (64, 64 * len(examples))
            places = [
                a["style"].split()[-1]
                for tag, a in Page(file).attributes
                if tag == "img" and "heat" in (a["src"] or "")
            ]
            assert places[0] == "0.0%" and places[-1] == "100.0%" and len(places) == len(examples)


def test_itda_shows_where_an_atom_came_from(report):
    kind, _, folder = report
    sources = list((folder / "assets" / "sources").iterdir())
    assert bool(sources) == (kind == "itda")
    for file in sources:
        page = Page(folder / "features" / f"{file.stem}.html")
        assert f"../assets/sources/{file.name}" in page.links


def test_limit_keeps_the_best_feature_of_each_tag(world):
    index = world.index
    order = index.order
    assert choose_features(index, 0) == [int(f) for f in order if index.alive[f]]
    assert choose_features(index, 3) == [int(f) for f in order[:3]]
    one = dataclasses.replace(index, tag_feature=np.full_like(index.tag_feature, order[5]))
    assert choose_features(one, 2) == [int(order[0]), int(order[5])]


def test_limit_size_and_heat_are_honoured(world, tmp_path):
    config = ReportConfig(index=world.root / "index", out=tmp_path / "report", features=2, size=48)
    assert write_report(config)["pages"] == 2
    soft = {f.name: f.read_bytes() for f in (config.out / "assets" / "heat").iterdir()}
    assert len(soft) == 2
    assert write_report(dataclasses.replace(config, heat="grid"))["pages"] == 2
    grid = {f.name: f.read_bytes() for f in (config.out / "assets" / "heat").iterdir()}
    assert soft.keys() == grid.keys() and all(soft[name] != grid[name] for name in soft)
    assert Image.open(config.out / "assets" / "heat" / next(iter(soft))).size[0] == 48
    assert [file.name for file in tmp_path.iterdir()] == ["report"]


def test_index_and_store_can_move_together_or_apart(world, tmp_path):
    shutil.copytree(world.root, tmp_path / "a")
    config = ReportConfig(index=tmp_path / "a" / "index", out=tmp_path / "r", features=1, size=32)
    write_report(config)
    (tmp_path / "a" / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="--store: expected the indexed activation store"):
        write_report(config)
    write_report(dataclasses.replace(config, store=tmp_path / "elsewhere"))


def plain_store(path, *, picture=None, labels=(), seed=0):
    rng = np.random.default_rng(seed)
    spec = StoreSpec(
        sites={"double.0.img": (16, 16)},
        images=4,
        steps=1,
        prompts=["", "cat", "cat", "a dog"],
        seeds=[0, 1, 2, 3],
        split=[1] * 4,
        labels=labels,
        sigmas=[1.0],
        timesteps=[1000.0],
        grid=(4, 4),
        picture=picture,
        images_per_shard=4,
    )
    x = rng.standard_normal((4, 1, 16, 16)).astype(np.float32)
    pictures = None if picture is None else np.zeros((4, *picture, 3), np.uint8)
    create_store(path, spec).write(0, {"double.0.img": x}, pictures)


@pytest.mark.parametrize("picture", [None, (24, 40)])
def test_a_store_without_labels_words_or_pictures(world, tmp_path, picture):
    plain_store(tmp_path / "store", picture=picture)
    build_index(
        IndexConfig(
            dictionary=world.root / "sae_img", store=tmp_path / "store", out=tmp_path / "index"
        )
    )
    config = ReportConfig(index=tmp_path / "index", out=tmp_path / "report", size=40)
    assert write_report(config)["pages"] > 0
    text = " ".join("".join(Page(config.out / "index.html").text).split())
    assert ("no pictures" in text) == (picture is None)
    assert "ground truth" not in text
    strip = next((config.out / "assets" / "heat").iterdir())
    assert Image.open(strip).size == (40, (40 if picture is None else 24) * 4)


def test_another_store_is_refused(world, tmp_path):
    plain_store(tmp_path / "store")
    config = ReportConfig(index=world.root / "index", out=tmp_path / "r", store=tmp_path / "store")
    with pytest.raises(ValueError, match="expected the store that the index"):
        write_report(config)
    assert not config.out.exists()


def test_a_folder_with_other_things_is_left_alone(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="other things"):
        write_report(ReportConfig(index=world.root / "index", out=out))
    assert (out / "thesis.tex").read_text() == "years of work"


def test_config_is_saved_beside_the_report(report):
    saved = json.loads((report[2] / "report.json").read_text())
    assert saved["config"]["size"] == 64 and saved["pages"] == report[1]["pages"]


@pytest.mark.parametrize("changes", [{"features": -1}, {"size": 8}, {"heat": "jet"}])
def test_bad_settings_name_the_flag(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"--{name}: expected .*, got .*; "):
        ReportConfig(index=Path("i"), out=Path("o"), **changes)


def test_every_kind_of_dictionary_has_a_name():
    names = {kind: kind_name(kind) for kind in (*ENCODER_KINDS, "itda")}
    assert names["topk"] == "TopK sparse autoencoder" and names["itda"] == "ITDA dictionary"
    assert len(set(names.values())) == len(names)
    for kind, name in names.items():
        assert name.split()[0].lower() == kind and name[0].isupper()


def test_numbers_are_short():
    texts = [charts.number(x) for x in (0, 1.23456, 0.012345, 1234.5, 12.3, 0.00001234, 100)]
    assert texts == ["0", "1.23", "0.0123", "1,234", "12.3", "1.2e-05".replace("-05", "-5"), "100"]
    assert charts.percent(0.01234) == "1.23 %"


def test_bars_are_proportional_and_never_vanish():
    chart = charts.histogram(np.asarray([0, 1, 1000]), 2.0, height=100)
    assert [bar.height for bar in chart.bars] == [0, 1.5, 100]
    assert charts.densities(np.zeros(3)).bars == []
    counts = charts.densities(np.asarray([0, 0.001, 0.5, 1.0]))
    assert sum(bar.height > 0 for bar in counts.bars) == 3
