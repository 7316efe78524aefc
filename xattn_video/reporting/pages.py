"""Pages out of templates, and pages of which a part is generated."""

from pathlib import Path


def render(template: Path, **values: object) -> str:
    """A Markdown page: a jinja2 template with its values filled in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)


def replace_between(text: str, begin: str, end: str, content: str) -> str:
    """A page with other content between two marks, which stay.

    Raises:
        ValueError: The page does not hold each mark once.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"the page must hold these two lines once, in this order: {begin.strip()} and "
            f"{end.strip()}; put them back."
        )
    before, rest = text.split(begin)
    return before + begin + content + end + rest.split(end)[1]
