"README.md from nbs/index.ipynb, with nbconvert: the front page of the site and of the repository are one text."
import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ClearOutputPreprocessor

ROOT = Path(__file__).parents[1]


def from_nbs(match): # links in the notebook are relative to nbs/, in the README to the top
    return f"{match[1]}{(Path('nbs') / match[2]).as_posix()}{match[3]}"


def readme(nb=ROOT / "nbs" / "index.ipynb"):
    "The text of README.md."
    text, _ = MarkdownExporter(preprocessors=[ClearOutputPreprocessor(enabled=True)]).from_filename(str(nb))
    text = re.sub(r"^#\|.*\n", "", text, flags=re.M)
    text = re.sub(r'(\]\()(?!https?://|#)([^)\s]+)(\))', from_nbs, text)
    text = re.sub(r'((?:src|href)=")(?!https?://|#|data:)([^"]+)(")', from_nbs, text)
    return text.replace("](nbs/../", "](").strip() + "\n"


if __name__ == "__main__": (ROOT / "README.md").write_text(readme(), encoding="utf-8")
