"""What pyproject.toml cannot say: the description of the package, which is the README without
links into the tree. An index shows it on a page of its own, where these lead nowhere."""

import re
from pathlib import Path

from setuptools import setup

_TO_THE_TREE = r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)"
_WHERE = "\nThe pages and files that this text names come with the source distribution.\n"


def described(readme: str) -> str:
    """Return a README without pictures and links of the tree: of a link, its text stays."""
    readme = re.sub(rf"!{_TO_THE_TREE}\n+", "", readme)
    return re.sub(_TO_THE_TREE, r"\1", readme) + _WHERE


if __name__ == "__main__":
    setup(
        long_description=described(Path(__file__).with_name("README.md").read_text("utf-8")),
        long_description_content_type="text/markdown",
    )
