"""The search for the threshold that gives a number of atoms, on made-up power laws."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdict.itda.threshold_search import MOST_TRIALS, Trial, next_threshold


@settings(max_examples=100, deadline=None)
@given(
    atoms=st.integers(20, 5000),
    slope=st.floats(0.3, 4),
    one=st.floats(1, 300),
    growth_rate=st.floats(0.1, 0.9),
)
def test_the_search_ends_near_the_atoms_asked_for(atoms, slope, one, growth_rate):
    rows, trials = 100_000, []
    while (threshold := next_threshold(trials, atoms, rows)) is not None:
        low = max((t.threshold for t in trials if not t.whole), default=0)
        high = min((t.threshold for t in trials if t.whole), default=1)
        assert low < threshold < high
        final = int(one * threshold**-slope)
        if final > atoms:
            cut = max(1, int(rows * (atoms / final) ** (1 / growth_rate)))
            trials.append(Trial(threshold, cut, atoms + 1, False))
        else:
            trials.append(Trial(threshold, rows, final, True))
        assert len(trials) < 100
    fits = [t.atoms for t in trials if t.whole]
    reachable = one < 0.9 * atoms and int(one * 1e-4**-slope) > atoms
    if reachable:
        assert max(fits) >= 0.9 * atoms
        assert len(trials) <= MOST_TRIALS
