"""The flags of the text and its shards."""

import re
from dataclasses import dataclass

from preflight.settings.kinds import CLEANERS
from preflight.settings.options import MAX_COUNT, check_unicode, setting

TEST_DOCUMENTS = 10_000  # what --test-mode reads


def _check_share(text: str) -> str:
    """``NAME=SHARE``."""
    match = re.fullmatch(r"([^=]+)=([0-9]*\.?[0-9]+)", text)
    if match is None or not 0 < float(match[2]) <= 1:
        raise ValueError("takes names and shares up to 1, such as wiki=0.7 code=0.3")
    return text


@dataclass(frozen=True)
class DataSettings:
    """The training text, and the token shards made from it."""

    text_file: tuple[str, ...] = setting(
        (),
        "training text: files, folders (each file is a document), globs, or - for stdin; .gz .bz2 "
        ".xz .zst of each; tables (.jsonl .json .csv .tsv .parquet), MediaWiki dumps (.xml), and "
        "tokens (.npy .bin)",
        metavar="PATH",
    )
    source: str | None = setting(
        None, "a data set on the Hugging Face hub, such as hf:HuggingFaceFW/fineweb", metavar="NAME"
    )
    source_config: str | None = setting(
        None, "the configuration of --source, such as sample-10BT", metavar="NAME"
    )
    workers: int = setting(4, "streams of --source that are read at once", ge=1, le=64)
    text_column: str | None = setting(
        None,
        "the column of a table that holds the text; unset: guessed by its name",
        metavar="NAME",
    )
    allow_bad_rows: bool = setting(
        False, "accept tables in which more than 1 % of the rows hold no text"
    )
    val_file: tuple[str, ...] = setting(
        (),
        "validation text, as --text-file; then all of --text-file is for training",
        metavar="PATH",
    )
    mix: tuple[str, ...] = setting(
        (),
        "shares of tokens for the sources, each by a part of its path: wiki=0.7 code=0.3",
        metavar="NAME=SHARE",
        check=_check_share,
    )
    clean: str | None = setting(
        None, "turn markup into text; unset: wiki for dumps, otherwise none", choices=CLEANERS
    )
    filter: tuple[str, ...] = setting(
        (),
        "drop documents by published rules (gopher_quality gopher_repetition c4 fineweb), by "
        "length (min_tokens=100) or by a numeric column (language_score>=0.65)",
        metavar="RULE",
    )
    deduplicate: str = setting(
        "none",
        "drop documents that are there already: exact copies, or near copies by MinHash",
        choices=("none", "exact", "near"),
    )
    show_dropped: int = setting(0, "print so many examples of each rule's drops", ge=0, le=100)
    limit_documents: int | None = setting(
        None, "read only so many documents or rows of each source", ge=1, le=2**53
    )
    test_mode: bool = setting(
        False, f"read only {TEST_DOCUMENTS:,} documents or rows of each source"
    )
    license: str | None = setting(
        None, "the licence of the text, for the data report", metavar="TEXT", check=check_unicode
    )
    data_dir: str = setting("data", "folder of the token shards", metavar="DIR")
    shard_size: int = setting(10_000_000, "tokens per shard", ge=1024, le=MAX_COUNT)
    val_split: float = setting(0.05, "fraction of the text held out for validation", gt=0, le=0.5)
    num_workers: int | None = setting(
        None, "tokenization processes; unset: one per CPU core", ge=1, le=1024
    )
    document_separator: str | None = setting(
        None,
        "text that separates documents within a file, such as '<|endoftext|>'",
        metavar="TEXT",
        check=check_unicode,
    )
    output_dir: str | None = None  # the value of --output-dir, no flag of this group

    @property
    def own_folders(self) -> tuple[str, ...]:
        """The folders that a run writes, which are no part of its text."""
        return (self.data_dir, *([self.output_dir] if self.output_dir else []))

    @property
    def document_limit(self) -> int | None:
        """Documents or rows to read of each source."""
        return TEST_DOCUMENTS if self.test_mode else self.limit_documents

    @property
    def is_processed(self) -> bool:
        """Whether documents are changed or dropped, so that they are read row by row."""
        cleans = self.clean not in (None, "none")
        return cleans or bool(self.filter) or self.deduplicate != "none"

    @property
    def has_text(self) -> bool:
        """Whether the flags name a text of the user's."""
        return bool(self.text_file or self.source)
