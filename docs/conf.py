"Sphinx settings. docs/build.py lays the pages out and calls Sphinx; nothing here needs a network."
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
from reference import names  # noqa: E402

settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
project, release, copyright = settings['title'], settings['version'], settings['copyright']

extensions = ['myst_nb']
nb_execution_mode, nb_ipywidgets_js = 'off', {}
myst_enable_extensions, myst_heading_anchors, myst_update_mathjax = ['dollarmath', 'colon_fence'], 3, False
html_theme, html_title = 'furo', project
html_math_renderer = 'mathml'
html_static_path, html_css_files = ['_static'], ['site.css']
html_copy_source = html_show_sourcelink = html_show_search_summary = False  # a file may not fetch another for a summary
html_theme_options = {'light_css_variables': {'color-brand-primary': '#0b5c8f', 'color-brand-content': '#0b5c8f'},
                      'dark_css_variables': {'color-brand-primary': '#6cb8e6', 'color-brand-content': '#6cb8e6'}}
pygments_style, pygments_dark_style = 'tango', 'monokai'
log, NAMES = logging.getLogger(__name__), names(ROOT)


def mathml(latex, display, where):
    "A formula as MathML; a command that is not understood is a warning, so that no page shows it raw."
    made = convert(latex, display='block' if display else 'inline')
    made = re.sub(r'(<mo[^>]*>(?:&#x0005B;|&#x00028;|&#x0002C;|&#x0003D;|[\[(,=])</mo>)<mo>&#x02212;', r'\1<mo form="prefix">&#x02212;', made)  # a sign
    if unknown := re.findall(r'\\[a-zA-Z]+', made): log.warning('formula with %s: %s', ' '.join(unknown), latex, location=where)
    return made


def inline_math(self, node):
    self.body.append(mathml(node.astext(), False, node))
    raise nodes.SkipNode


def display_math(self, node):
    self.body.append(f'<div class="formula">{mathml(node.astext(), True, node)}</div>')
    raise nodes.SkipNode


def link_names(app, tree, page):
    "Lead code in running text to the reference: `Surface`, `use_bits`, `sweep(...)`, `mebqat.bits`."
    for node in list(tree.findall(nodes.literal)):
        word = re.fullmatch(r'(?:mebqat\.)?([A-Za-z_][\w.]*)(\(.*\))?', node.astext())
        if not word or isinstance(node.parent, (nodes.reference, nodes.title)): continue
        target = NAMES.get(node.astext().split('(')[0]) or NAMES.get(word[1])
        plain = word[1].islower() and '_' not in word[1] and '.' not in word[1] and not word[2] and not node.astext().startswith('mebqat.')
        if target is None or plain or target[0] == page: continue
        place = app.builder.get_relative_uri(page, target[0]) + (f'#{target[1]}' if target[1] else '')
        node.replace_self(nodes.reference('', '', node.deepcopy(), refuri=place, internal=True, classes=['name']))


def scripts(app, page, template, context, tree):
    "Load plotly.js where there is a figure, and nowhere else."
    body = context.get('body') or ''
    if 'class="plot"' in body: app.add_js_file('plotly.min.js', loading_method='defer')
    if 'class="plot"' in body or '<iframe' in body:
        app.add_js_file('themes.js', loading_method='defer')
        app.add_js_file('site.js', loading_method='defer')


def setup(app):
    app.add_html_math_renderer('mathml', (inline_math, None), (display_math, None))
    app.connect('doctree-resolved', link_names)
    app.connect('html-page-context', scripts)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
