"""Site names: they round-trip, globs expand in the model's order, bad names point to good ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvest.sites import KINDS, Site, all_sites, expand_sites, parse_site


@given(
    st.sampled_from(("double", "single")),
    st.integers(0, 200),
    st.sampled_from(("img", "txt")),
    st.sampled_from(KINDS),
)
def test_names_round_trip(block, index, stream, kind):
    site = Site(block, index, stream, kind)
    assert parse_site(str(site)) == site


def test_parts_of_a_name():
    assert parse_site("double.2.img.mlp") == Site("double", 2, "img", "mlp")
    assert parse_site("single.20.txt") == Site("single", 20, "txt", "")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dobule.7.img", "double.7.img"),
        ("double.7.image", "double.7.img"),
        ("single.3.txt.mpl", "single.3.txt.mlp"),
        ("double.07.img", "double.7.img"),
        ("", "expected a site such as"),
    ],
)
def test_a_bad_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match="expected a site") as error:
        parse_site(name)
    assert nearest in str(error.value)


def test_all_sites_are_in_the_order_of_computation():
    assert all_sites(1, 1) == ("double.0.img", "double.0.txt", "single.0.img", "single.0.txt")
    assert len(all_sites(19, 38, KINDS)) == (19 + 38) * 2 * len(KINDS)


def test_a_glob_matches_part_by_part():
    expand = lambda *patterns: expand_sites(patterns, double=3, single=2)  # noqa: E731
    assert expand("double.*.img") == ("double.0.img", "double.1.img", "double.2.img")
    assert expand("*.1.txt") == ("double.1.txt", "single.1.txt")
    assert expand("single.[01].img.mlp") == ("single.0.img.mlp", "single.1.img.mlp")
    assert expand("single.0.txt, double.2.img", "double.2.*") == (
        "double.2.img",
        "double.2.txt",
        "single.0.txt",
    )


@pytest.mark.parametrize("pattern", ["single.1.img", "single.1.*", "*.1.img", "single.[1].img"])
def test_the_number_of_a_block_is_matched_whole(pattern):
    """As names: single.1 is not the beginning of single.10."""
    found = expand_sites([pattern], double=1, single=21)
    assert {name.split(".")[1] for name in found} == {"1"}


@pytest.mark.parametrize("pattern", ["double.3.img", "double.*.pixel", "double.2", "triple.*.img"])
def test_a_pattern_without_a_match_names_the_nearest(pattern):
    with pytest.raises(ValueError, match="the nearest are") as error:
        expand_sites(["double.0.img", pattern], double=3, single=2)
    assert pattern in str(error.value)


def test_no_site_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one site"):
        expand_sites([" "], double=3, single=2)
