"""Pages from templates, and generated parts of pages."""

from pathlib import Path


def render(template: Path, **values: object) -> str:
    """Render a jinja2 template with these values, escaped if it is ``.html.jinja``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)


def replace_between(text: str, begin: str, end: str, content: str) -> str:
    """Replace the content between two marks of a page and keep the marks.

    Raises:
        ValueError: The page does not hold each mark exactly once.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"the page must hold these two lines once, in this order: {begin.strip()} and "
            f"{end.strip()}; put them back."
        )
    before, rest = text.split(begin)
    return before + begin + content + end + rest.split(end)[1]
