"""Read a page as a parser reads it."""

import json
from html.parser import HTMLParser

from fuselm.results.pages.rendering import render_template

SCRIPTS = ("page.js.jinja", "token_view.js.jinja")  # all that a page may run


class Page(HTMLParser):
    """Check that tags nest; collect text, tags, what they refer to, and the scripts that are not ours."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts, self.references, self.foreign_scripts = [], [], [], [], []
        self.own_scripts = {render_template(name).strip() for name in SCRIPTS}

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.is_data = ("type", "application/json") in attributes
        self.references += [v for n, v in attributes if n in ("src", "href", "xlink:href", "action", "style")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            if self.is_data:
                assert "<" not in data
                json.loads(data)
            elif data.strip() not in self.own_scripts:
                self.foreign_scripts.append(data)
        else:
            self.texts.append(data)
