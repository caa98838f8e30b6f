from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashare_stream.text import (
    MAX_NAME_BYTES,
    bytes_shown,
    derived_name,
    folded,
    name_fault,
    parse_bytes,
    printable,
    slug,
    spelled,
    unique_names,
)


@given(st.text())
def test_shown_prints_no_control_and_no_bidirectional_character(text: str) -> None:
    assert printable(text).isprintable()


@given(st.text(), st.text(min_size=1))
def test_a_derived_name_can_always_name_a_folder(base: str, source: str) -> None:
    assert name_fault(derived_name(base, source)) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "a\nb", "a\x00b", "x" * 300, " a", ".hidden", "NUL", "a."]
)
def test_unsafe_names_are_refused(name: str) -> None:
    assert name_fault(name) is not None


@pytest.mark.parametrize("name", ["a", "org--name", "日本語", "task 3", "v1.2", "x" * MAX_NAME_BYTES])
def test_ordinary_names_are_accepted(name: str) -> None:
    assert name_fault(name) is None


@given(
    st.lists(st.tuples(st.text(min_size=1), st.sampled_from(["a", "A", "b", "é", "e\u0301", "x" * 250])), unique=True),
    st.randoms(),
)
def test_names_are_unique_whatever_the_case_and_do_not_depend_on_the_order(
    wanted: list[tuple[str, str]], rnd: object
) -> None:
    names = dict(zip(wanted, unique_names(wanted), strict=True))
    assert len({folded(n) for n in names.values()}) == len(wanted)
    assert all(name_fault(n) is None for n in names.values())
    backwards = wanted[::-1]
    assert dict(zip(backwards, unique_names(backwards), strict=True)) == names


def test_a_clash_suffixes_every_member_and_a_given_name_is_never_taken() -> None:
    first, second = unique_names([("/x/a", "a"), ("/y/A", "A")])
    assert first.startswith("a-")
    assert second.startswith("A-")
    assert len(first) == len("a-") + 8
    assert unique_names([("/x/a", "a")], taken=["A"])[0].startswith("a-")
    assert unique_names([("/x/a", "a")], taken=["b"]) == ["a"]


@given(st.text())
def test_a_slug_is_one_safe_component(text: str) -> None:
    assert name_fault(slug(text)) is None


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1.5g", 3 << 29), ("1024", 1024), ("2 KiB", 2048)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "4 apples", "-1GiB", "GiB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_bytes_shown() -> None:
    assert [bytes_shown(n) for n in (0, 1023, 1536, 5 << 30, 3 << 41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "6.0 TiB",
    ]


@pytest.mark.parametrize(
    ("shell", "python"),
    [
        ("any_base (--any-base) cannot be 3", "any_base cannot be 3"),
        ("center (--center) cannot be 3", "center cannot be 3"),
        ("base_aliases (--base-alias) cannot be 3", "base_aliases cannot be 3"),
        ("open a pull request (--create-pr).", "open a pull request (create_pr=True)."),
        ("--max-error 0.25 without --directions", "max_error=0.25 without directions=True"),
        ("by swift export --to_peft_format true", "by swift export --to_peft_format true"),
    ],
)
def test_messages_in_python_name_its_arguments(shell: str, python: str) -> None:
    assert spelled(shell) == python
