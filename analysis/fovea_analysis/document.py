"""A page as Markdown with files beside it, and as one HTML file that holds everything."""
import base64
import html
import re

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1000px;
  margin: 2em auto; padding: 0 1em; }
h1, h2, h3 { line-height: 1.2; margin: 1.6em 0 .5em; }
table { border-collapse: collapse; margin: 1em 0; font-size: .88em; display: block;
  overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: .35em .7em; text-align: left;
  font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #444; }
figure { margin: 1.2em 0; } img { max-width: 100%; }
figcaption { font-size: .88em; color: #444; max-width: 52em; }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; font-size: .85em; }
code { background: #f4f4f4; } .note { border-left: 4px solid #888; padding-left: .8em; }
"""
TYPES = {".png": "image/png", ".gif": "image/gif"}


def cell(text):
    return str(text).replace("|", "\\|").replace("\n", " ")


def inline(text):
    """`code` and **bold** of an escaped text."""
    text = html.escape(str(text), quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


class Document:
    """Blocks in order; each method adds one."""

    def __init__(self, title):
        self.title, self.blocks = title, []

    def heading(self, text, level=2):
        self.blocks.append(("heading", level, text))

    def text(self, *paragraphs):
        self.blocks += [("text", None, p) for p in paragraphs if p]

    def note(self, text):
        self.blocks.append(("note", None, text))

    def items(self, lines):
        self.blocks.append(("items", None, list(lines)))

    def code(self, text):
        self.blocks.append(("code", None, text.rstrip("\n")))

    def table(self, head, rows):
        self.blocks.append(("table", head, [list(r) for r in rows]))

    def picture(self, picture):
        self.blocks.append(("picture", picture.file, picture.caption))

    def markdown(self):
        out = [f"# {self.title}"]
        for kind, more, content in self.blocks:
            if kind == "heading":
                out.append("#" * more + " " + content)
            elif kind == "text":
                out.append(content)
            elif kind == "note":
                out.append("> " + content)
            elif kind == "items":
                out.append("\n".join("- " + line for line in content))
            elif kind == "code":
                out.append(f"```\n{content}\n```")
            elif kind == "picture":
                out.append(f"![{cell(content) or more}]({more})" + (f"\n\n*{content}*" if content
                                                                    else ""))
            else:
                lines = ["| " + " | ".join(map(cell, r)) + " |" for r in [more] + content]
                lines.insert(1, "|" + "---|" * len(more))
                out.append("\n".join(lines))
        return "\n\n".join(out) + "\n"

    def html(self, folder):
        out = [f"<h1>{inline(self.title)}</h1>"]
        for kind, more, content in self.blocks:
            if kind == "heading":
                out.append(f"<h{more}>{inline(content)}</h{more}>")
            elif kind == "text":
                out.append(f"<p>{inline(content)}</p>")
            elif kind == "note":
                out.append(f'<p class="note">{inline(content)}</p>')
            elif kind == "items":
                out.append("<ul>" + "".join(f"<li>{inline(i)}</li>" for i in content) + "</ul>")
            elif kind == "code":
                out.append(f"<pre>{html.escape(content, quote=False)}</pre>")
            elif kind == "picture":
                path = folder / more
                data = base64.b64encode(path.read_bytes()).decode()
                alt = html.escape(content or path.stem)
                out.append(f'<figure><img alt="{alt}" src="data:{TYPES[path.suffix]};base64,'
                           f'{data}"><figcaption>{inline(content)}</figcaption></figure>')
            else:
                rows = "".join("<tr>" + "".join(f"<td>{inline(c)}</td>" for c in r) + "</tr>\n"
                               for r in content)
                head = "".join(f"<th>{inline(c)}</th>" for c in more)
                out.append(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>")
        return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head>\n<body>\n"
                + "\n".join(out) + "\n</body></html>\n")
