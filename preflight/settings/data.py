"""The flags of the text and its shards."""

from dataclasses import dataclass

from preflight.settings.options import MAX_COUNT, check_unicode, setting


@dataclass(frozen=True)
class DataSettings:
    """The training text, and the token shards made from it."""

    text_file: tuple[str, ...] = setting(
        (),
        "training text: files, folders (each file is a document), globs, or - for stdin",
        metavar="PATH",
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
