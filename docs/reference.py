"The reference: a page for each module, from the signatures and docments of what it exports."
import importlib
import inspect
import json
import re
from dataclasses import fields, is_dataclass
from functools import cache
from html import escape
from pathlib import Path

from fastcore.docments import docments


def modules(root):
    "Name of every exported module to its notebook, in the order of the notebooks."
    found = {}
    for nb in in_order(Path(root)/'nbs'):
        for cell in json.loads(nb.read_text(encoding='utf-8'))['cells']:
            if m := re.search(r'^#\|\s*default_exp\s+(\S+)', ''.join(cell['source']), re.M):
                found[m[1].removesuffix('.__init__')] = nb.relative_to(Path(root)/'nbs').as_posix().removesuffix('.ipynb')
    return found


def in_order(folder):
    "Every notebook of the repository: the core, then wing by wing from the lower floors up, then the doors."
    floors = ['', 'fewshot', 'mixed', 'figures', 'explore', 'runs', 'doors']
    floor = lambda p: 'doors' if p.parent == folder and p.name > '9' else p.parent.relative_to(folder).as_posix().replace('.', '')
    found = [*folder.glob('[0-9]*.ipynb'), *(p for w in floors[1:-1] for p in (folder/w).glob('[0-9]*.ipynb'))]
    return sorted(found, key=lambda p: (floors.index(floor(p)), p.name))


def number(notebook):
    "How text calls a notebook: `02`, or `mixed/01`."
    return re.match(r'(?:\w+/)?\d\d', notebook)[0]


@cache
def exported(module):
    "Functions and classes that a module defines and exports, and its constants."
    m = importlib.import_module(f'mebqat.{module}')
    own = {n: getattr(m, n) for n in m.__all__}
    kinds = {n: o for n,o in own.items() if (inspect.isclass(o) or inspect.isfunction(o)) and o.__module__ == m.__name__}
    return kinds, {n: o for n,o in own.items() if n not in kinds}


@cache
def names(root):
    "Every name that text may lead to: page and anchor."
    found, twice = {}, set()
    for module in modules(root):
        found[f'mebqat.{module}'] = (f'reference/{module}', '')
        for name, thing in exported(module)[0].items():
            if name in found: twice.add(name)
            found[name] = (f'reference/{module}', f'{module}.{name}')
            for base in reversed(parents(thing)):
                home = base.__module__.removeprefix('mebqat.')
                found |= {f'{name}.{k}': (f'reference/{home}', f'{home}.{base.__name__}.{k}') for k in methods(base)}
    return {k: v for k,v in found.items() if k not in twice}


def methods(cls):
    "Public methods and properties that a class defines itself."
    calls = lambda v: inspect.isfunction(v) or isinstance(v, (classmethod, staticmethod, property))
    return {k: v for k,v in vars(cls).items() if calls(v) and (not k.startswith('_') or k == '__call__')}


def parents(thing):
    "A class and those of the package that it builds on."
    return [c for c in getattr(thing, '__mro__', ()) if c.__module__.startswith('mebqat.')]


def short(kind):
    "A type as a reader would write it."
    text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r'\1', text).replace("'", '').replace('NoneType', 'None')


def code(text):
    "Text as HTML, what stands in backticks as code."
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', escape(text, quote=False))


def default(value):
    "A default value as it would be typed."
    return re.sub(r'<(?:function|class|built-in function) \'?([\w.]+).*', lambda m: m[1].split('.')[-1], repr(value))


def signature(name, thing):
    "The call, one line if it is short."
    if inspect.isclass(thing) and issubclass(thing, BaseException): return f'class {name}({thing.__base__.__name__})'
    s = inspect.signature(thing)
    gone = ('self', 'cls') if '.' in name or inspect.isclass(thing) else ()
    parts, before = [], None
    for p in s.parameters.values():
        if p.name in gone: continue
        if p.kind is p.KEYWORD_ONLY and before not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL): parts.append('*')
        star = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
        kind = '' if p.annotation is p.empty else f':{short(p.annotation)}'
        parts.append(f'{star}{p.name}{kind}' + ('' if p.default is p.empty else f'={default(p.default)}'))
        before = p.kind
    back = '' if s.return_annotation in (s.empty, None) or inspect.isclass(thing) else f' -> {short(s.return_annotation)}'
    line = f'{name}({", ".join(parts)}){back}'
    return line if len(line) <= 88 else f'{name}(\n    ' + ',\n    '.join(parts) + f',\n){back}'


def sentences(thing):
    "What the options of a run say of themselves, and what their default means, by name."
    says = {f.name: f.metadata for f in fields(thing) if 'says' in f.metadata} if is_dataclass(thing) else {}
    return {name: m['says'] + (f' (default: {m["otherwise"]})' if m['otherwise'] else '') for name,m in says.items()}


def table(thing):
    "Parameters and result: name, type, default, what it is."
    rows, options = [], sentences(thing)
    if inspect.isclass(thing) and issubclass(thing, BaseException): return rows
    for name, d in docments(thing, full=True, returns=True).items():
        if name in ('self', 'cls') or not d['docment'] and (name == 'return' or d['anno'] is inspect.Parameter.empty): continue
        kind = '' if d['anno'] is inspect.Parameter.empty else f'<code>{escape(short(d["anno"]))}</code>'
        value = '' if d['default'] is inspect.Parameter.empty else f'<code>{escape(default(d["default"]))}</code>'
        first = '<em>returns</em>' if name == 'return' else f'<code>{name}</code>'
        what = ' '.join((d['docment'] or options.get(name, '')).split())
        rows.append(f'<tr><td>{first}</td><td>{kind}</td><td>{value}</td><td>{code(what)}</td></tr>')
    if not rows: return []
    head = '<tr><th>Parameter</th><th>Type</th><th>Default</th><th>What it is</th></tr>'
    return ['```{raw} html', f'<div class="docments"><table><thead>{head}</thead><tbody>', *rows, '</tbody></table></div>', '```', '']


def entry(module, name, thing, level):
    "One function, class, method or property. Sphinx's own anchors know no capitals: `Cost` and `cost` need these."
    out = ['```{raw} html', f'<span class="anchor" id="{module}.{name}"></span>', '```', '', f'{"#"*level} {name}', '']
    if isinstance(thing, property):
        kind = inspect.signature(thing.fget).return_annotation
        said = '' if kind is inspect.Signature.empty else f' `{short(kind)}`.'
        return [*out, f'*property*{said} {inspect.getdoc(thing) or ""}'.rstrip(), '']
    mark = {classmethod: '*class method* ', staticmethod: '*static method* '}.get(type(thing), '')
    call = thing.__func__ if mark else thing
    out += ['```python', signature(name, call), '```', '']
    own = vars(call).get('__doc__') if inspect.isclass(call) else call.__doc__
    generated = inspect.isclass(call) and (own or '').startswith(f'{call.__name__}(')
    if mark or own and not generated: out += [mark + inspect.cleandoc('' if generated else own or ''), '']
    return out + table(call)


def page(module, notebook):
    "The page of one module."
    m, (things, constants) = importlib.import_module(f'mebqat.{module}'), exported(module)
    out = [f'# mebqat.{module}', '', inspect.getdoc(m) + '.', '', f'Where it is explained and made: [notebook {number(notebook)}](../nbs/{notebook}.ipynb).', '']
    if constants: out += ['Constants: ' + ', '.join(f'`{n}`' for n in constants) + '.', '']
    for name, thing in things.items():
        out += entry(module, name, thing, 2)
        if inspect.isclass(thing):
            if above := parents(thing)[1:]: out += ['Also everything of ' + ' and '.join(f'`{c.__name__}`' for c in above) + '.', '']
            for k, method in methods(thing).items(): out += entry(module, f'{name}.{k}', method, 3)
    return '\n'.join(out)


def pages(root):
    "File name to text, for every module and the list of them."
    found = modules(root)
    made = {f'{module}.md': page(module, nb) for module,nb in found.items()}
    line = lambda m: inspect.getdoc(importlib.import_module(f'mebqat.{m}'))
    rows = [f'| [`mebqat.{m}`]({m}.md) | {line(m)} | [{number(nb)}](../nbs/{nb}.ipynb) |' for m,nb in found.items()]
    made['index.md'] = '\n'.join(['# Reference', '', 'Everything the package exports, read from the code itself. A module imports only from those above it.', '',
                                  '| module | what is in it | notebook |', '|---|---|---|', *rows, '', '```{toctree}', ':hidden:', '', *found, '```', ''])
    return made
