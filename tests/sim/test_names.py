from __future__ import annotations

import pytest

from fdcr_fast.sim.names import check_keys, did_you_mean

KNOWN = ("multi-krum", "local_epochs", "mnist", "fashion-mnist")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("multikrum", "multi-krum"),
        ("MULTI_KRUM", "multi-krum"),
        ("local-epochs", "local_epochs"),
        ("fashionmnist", "fashion-mnist"),
        ("zeno", None),
        ("", None),
    ],
)
def test_the_known_name_that_is_most_like_it(name: str, meant: str | None) -> None:
    assert did_you_mean(name, KNOWN) == ("" if meant is None else f"; did you mean {meant!r}?")


def test_all_unknown_keys_are_named_and_what_is_no_mapping_is_left_alone() -> None:
    with pytest.raises(ValueError, match=r"^unknown key 'mnits'; did you mean 'mnist'\?\nunknown key 'zeno'$"):
        check_keys("key", {"mnits": 1, "mnist": 2, "zeno": 3, 4: 5}, KNOWN)
    for harmless in ({}, {"mnist": 1, 2: 3}, "mnits", 3, None):
        check_keys("key", harmless, KNOWN)
