"""MediaWiki dumps, measured: megabytes of markup per second and core, and words kept.

    python benchmarks/wiki.py            (a real dump of 206 pages; needs a package index)
    python benchmarks/wiki.py --smoke    (a made one; no network, seconds)
    python benchmarks/wiki.py --dump enwiki-latest-pages-articles1.xml-p1p41242.bz2

The real dump is test data of the PyPI package gensim 4.4.0. wikiextractor 3.1.0 (AGPL) runs on the
same articles in an environment of its own; of its words, in order, at least 0.97 should be in each
article, and the goal of the rate is 1 MB/s of markup on one core. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from preflight.corpus.cleaning.wiki import clean_wiki  # noqa: E402
from preflight.corpus.sources import wiki_dump  # noqa: E402
from preflight.settings import DataSettings  # noqa: E402

SLICE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SLICE_SHA256 = "a53f4648dec40467"  # its beginning
BULGARIAN = "bgwiki-latest-pages-articles-shortened.xml.bz2"  # UTF-16
_MARKS = ("[[File", "thumb|", "Category:", "<ref", "{{", "[[", "''")
_ARTICLE = """{{Infobox x\n| a = [[b]]{{c|d}}\n}}
'''Name%d''' ({{lang-fr|nom}}) is a [[kind of thing|thing]]<ref name="a">{{cite|x=y}}</ref> of
''many'' [[word]]s, with [http://example.org a link] &amp; more.\n
[[File:x.png|thumb|A picture of [[it]]]]
== Heading ==\n* one\n* two\n{| class="x"\n! a !! b\n|-\n| 1 || 2\n|}\nThe end.\n
[[Category:Things]]\n"""


def get_dumps(folder: Path) -> None:
    """Put the real dumps into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "-d", str(folder), "gensim==4.4.0"], check=True)
    (wheel,) = folder.glob("gensim*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in (SLICE, BULGARIAN):
            (folder / name).write_bytes(archive.read(f"gensim/test/test_data/{name}"))
    wheel.unlink()
    digest = hashlib.sha256((folder / SLICE).read_bytes()).hexdigest()
    if not digest.startswith(SLICE_SHA256):
        raise SystemExit(f"{SLICE}: another file, SHA-256 {digest}")


def run_wikiextractor(dump: Path, folder: Path) -> tuple[dict[str, str], float]:
    """The articles of a .bz2 dump by title, and the processor's seconds for them."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "wikiextractor==3.1.0"]
    subprocess.run(pip, check=True)
    (folder / "a.xml").write_bytes(bz2.decompress(dump.read_bytes()))
    extract = [python, "-m", "wikiextractor.WikiExtractor", "a.xml", "--json", "--no-templates"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*extract, "-q", "-o", "-"], cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    pages = map(json.loads, done.stdout.splitlines())
    return {page["title"]: page["text"].replace("&amp;", "&") for page in pages}, seconds


def list_words(text: str) -> list[str]:
    """Runs of letters and digits."""
    return re.findall(r"\w+", text)


def count_common(ours: list[str], theirs: list[str]) -> int:
    """The length of the longest common subsequence, by bits (Hyyrö 2004)."""
    masks: dict[str, int] = {}
    for i, word in enumerate(theirs):
        masks[word] = masks.get(word, 0) | 1 << i
    full = (1 << len(theirs)) - 1
    state = full
    for word in ours:
        both = state & masks.get(word, 0)
        state = ((state + both) | (state - both)) & full
    return len(theirs) - state.bit_count()


def measure_shares(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, float]:
    """Of the words in each of their articles, which share is in ours, in order."""
    shares = {}
    for title, text in theirs.items():
        words = list_words(text)
        common = count_common(list_words(ours[title]), words)
        shares[title] = common / len(words) if words else 1.0
    return shares


def read_articles(path: Path, clean: str) -> dict[str, str]:
    """The texts of a dump by title, cleaned (wiki) or not (none)."""
    (source,) = wiki_dump.find(str(path), DataSettings(clean=clean)) or []
    rows = [row for b in source.batches() for row in source.parse(b.payload, b.first_row)]
    return {r.columns["title"]: r.text.partition("\n\n")[2] for r in rows if r.text}


def measure_dump(path: Path, n_times: int) -> dict[str, Any]:
    """Rates of the cleaner alone and of the whole way from the stored dump to text."""
    markup = read_articles(path, "none")
    megabytes = sum(len(text.encode()) for text in markup.values()) / 1e6
    clean_wiki("''loads'' the library")
    clean_times, dump_times = [], []
    for _ in range(n_times):
        began = time.process_time()
        texts = [clean_wiki(text) for text in markup.values()]
        clean_times.append(time.process_time() - began)
        began = time.process_time()
        read_articles(path, "wiki")
        dump_times.append(time.process_time() - began)
    text = "\n".join(texts)
    return {
        "articles": len(markup),
        "markup_mb": round(megabytes, 2),
        "text_mb": round(len(text.encode()) / 1e6, 2),
        "cleaner_mb_s": round(megabytes / min(clean_times), 2),
        "dump_to_text_mb_s": round(megabytes / min(dump_times), 2),
        "marks_left": {mark: text.count(mark) for mark in _MARKS if mark in text},
    }


def compare(path: Path, folder: Path, megabytes: float) -> dict[str, Any]:
    """The words of wikiextractor's articles that are in ours, and its rate."""
    theirs, seconds = run_wikiextractor(path, folder)
    shares = measure_shares(read_articles(path, "wiki"), theirs)
    worst = min(shares, key=shares.__getitem__)
    return {
        "wikiextractor_articles": len(theirs),
        "share_of_words_mean": round(sum(shares.values()) / len(shares), 4),
        "share_of_words_min": round(shares[worst], 4),
        "worst_article": worst,
        "wikiextractor_mb_s": round(megabytes / seconds, 2),
    }


def write_made_dump(path: Path, n_articles: int) -> None:
    """A dump of articles that are alike."""
    with bz2.open(path, "wt", encoding="utf-8") as file:
        file.write("<mediawiki>\n")
        for i in range(n_articles):
            text = (_ARTICLE % i).replace("&", "&amp;").replace("<", "&lt;")
            file.write(f"<page><title>Name{i}</title><ns>0</ns><revision><text>{text}</text>")
            file.write("</revision></page>\n")
        file.write("</mediawiki>\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a made dump; no network")
    parser.add_argument("--dump", type=Path, help="measure this dump, without wikiextractor")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if flags.dump:
            result = measure_dump(flags.dump, 1)
        elif flags.smoke:
            write_made_dump(folder / "made.xml.bz2", 300)
            result = measure_dump(folder / "made.xml.bz2", 1)
        else:
            get_dumps(folder)
            result = measure_dump(folder / SLICE, 3)
            result |= compare(folder / SLICE, folder, result["markup_mb"])
    for key, value in result.items():
        print(f"{key:26} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
