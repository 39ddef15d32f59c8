"""README.ko.md says what README.md says: the same sections, code, links and numbers, and no older text.

Under each heading of README.ko.md a comment names the English text that was translated there, by a hash. When
a section of README.md changes, its test fails until somebody has looked at the Korean one and renewed the
comment.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORDS = {"two": "2", "third": "3", "four": "4", "five": "5", "seven": "7", "ten": "10", "thirty": "30"}
"""Numbers that the English text spells out; the Korean one has digits."""

TERMS = {
    "작업": ("잡(", "작업자"),
    "태스크": ("테스크", "타스크"),
    "큐": ("대기열", "큐우"),
    "워커": ("작업자", "워크 프로세스", "일꾼"),
    "데드 레터": ("데드레터", "사문서", "배달 불능"),
    "트랜잭션": ("트랜젝션", "거래"),
    "재시도": ("재시행", "다시 시도"),
    "실행기(executor)": ("익스큐터",),
    "슈퍼바이저": ("감독자", "수퍼바이저"),
    "하트비트": ("심박", "하트 비트"),
    "크래시": ("크래쉬",),
    "멱등": ("idempotent",),
    "스케줄": ("스케쥴",),
}
"""The word for each idea, and words that are not used for it."""

_BLOCK = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- README\.md: (\w+) -->\n")
_COMMENT = re.compile(r"<!--.*?-->\n?")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Section:
    """A heading, and the text down to the next one."""

    level: int
    title: str
    text: str

    @property
    def prose(self) -> str:
        return _COMMENT.sub("", _BLOCK.sub("", self.text))

    @property
    def code(self) -> list[str]:
        return _BLOCK.findall(self.text)

    @property
    def spans(self) -> list[str]:
        return sorted(re.findall(r"`([^`\n]+)`", self.prose))

    @property
    def links(self) -> list[str]:
        return sorted(re.sub(r"^README(\.ko)?\.md$", "the other", link) for link in _LINK.findall(self.prose))

    @property
    def numbers(self) -> list[str]:
        text = re.sub(r"`[^`\n]+`", "", _LINK.sub("]", self.prose)).lower()
        spelt = re.sub(rf"\b({'|'.join(WORDS)})\b", lambda match: WORDS[match[0]], text)
        return sorted(re.findall(r"\d+(?:[.,]\d+)*", spelt))

    @property
    def shape(self) -> list[str]:
        """The paragraphs, list items and quotations, in order."""
        parts = re.split(r"\n\n|\n(?=- )", self.prose.strip())
        return [part[0] if part[:2] in ("- ", "> ") else "text" for part in parts if part.strip()]

    @property
    def mark(self) -> str:
        """What the Korean section names this text by; where its lines are broken does not matter."""
        words = " ".join(_COMMENT.sub("", self.text).split())
        return hashlib.sha256(words.encode()).hexdigest()[:10]


def sections(text: str) -> list[Section]:
    """The sections of a page; lines that begin with # in code are no headings."""
    code: list[str] = []

    def hide(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"\0{len(code) - 1}\0"

    hidden = _BLOCK.sub(hide, text)
    found = []
    for match in re.finditer(r"^(#+) ([^\n]+)\n(.*?)(?=^#+ |\Z)", hidden, re.MULTILINE | re.DOTALL):
        shown = re.sub(r"\0(\d+)\0", lambda hole: code[int(hole[1])], match[3])
        found.append(Section(len(match[1]), match[2], shown))
    return found


ENGLISH = sections((ROOT / "README.md").read_text(encoding="utf-8"))
KOREAN = sections((ROOT / "README.ko.md").read_text(encoding="utf-8"))


def differences(english: Section, korean: Section) -> list[str]:
    """What the Korean section does not have in common with the English one."""
    found = [
        f"{what}: README.md has {getattr(english, what)}, README.ko.md has {getattr(korean, what)}"
        for what in ("level", "code", "spans", "links", "numbers", "shape")
        if getattr(english, what) != getattr(korean, what)
    ]
    mark = _MARK.search(korean.text)
    if mark is None or mark[1] != english.mark:
        found.append(
            f"text: README.md has changed since it was translated; bring README.ko.md, section"
            f" {korean.title!r}, up to date, and put <!-- README.md: {english.mark} --> under its heading"
        )
    return found


def test_the_sections_are_the_same() -> None:
    levels = [[section.level for section in page] for page in (ENGLISH, KOREAN)]
    titles = [[section.title for section in page] for page in (ENGLISH, KOREAN)]
    assert levels[0] == levels[1], f"README.md has the sections {titles[0]}, README.ko.md has {titles[1]}"


@pytest.mark.parametrize("number", range(len(ENGLISH)), ids=[section.title for section in ENGLISH])
def test_a_section_says_the_same(number: int) -> None:
    english, korean = ENGLISH[number], KOREAN[number]
    found = differences(english, korean)
    assert not found, (
        f"section {english.title!r} of README.md and {korean.title!r} of README.ko.md:\n" + "\n".join(found)
    )


def test_one_word_per_idea() -> None:
    text = "\n".join(section.prose for section in KOREAN)
    assert [term for term in TERMS if term not in text] == []
    assert [other for others in TERMS.values() for other in others if other in text] == []


def test_sentences_are_polite() -> None:
    """Each sentence of the prose ends in 합니다 or 하십시오, or is no sentence."""
    for section in KOREAN:
        for sentence in re.findall(r"([가-힣]+다|[가-힣]+요)\.", section.prose):
            assert sentence.endswith("니다"), f"{section.title}: {sentence}"


def test_the_pages_lead_to_each_other() -> None:
    assert "[한국어](README.ko.md)" in ENGLISH[0].text
    assert "[English](README.md)" in KOREAN[0].text


@pytest.mark.parametrize(
    ("english", "korean", "what"),
    [
        ("a `b`", "a `c`", "spans"),
        ("seven days", "8일", "numbers"),
        ("[a](b.md)", "[a](c.md)", "links"),
        ("```sh\na # b\n```\n", "```sh\na # c\n```\n", "code"),
        ("- one\n- two", "- 하나", "shape"),
        ("other words", "같은 말", "text"),
    ],
)
def test_a_difference_is_seen(english: str, korean: str, what: str) -> None:
    same = Section(2, "A", "같은 말")
    marked = f"<!-- README.md: {same.mark} -->\n"
    assert differences(same, Section(2, "가", marked + "같은 말")) == []
    found = differences(Section(2, "A", english), Section(2, "가", marked + korean))
    assert [line for line in found if line.startswith(what)]


def test_a_comment_in_code_is_no_heading() -> None:
    (section,) = sections("# A\n\n```sh\n# no heading\n```\n")
    assert section.code == ["```sh\n# no heading\n```"]
