"Build from settings.ini, the one place for name, version and requirements."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup
from setuptools.command.sdist import sdist

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
extras = {name: cfg[f'{name}_requirements'].split() for name in ('lab', 'search', 'dev')}

WINGS = sorted(p.parent.name for p in Path('mebqat').glob('*/__init__.py'))


class SourceArchive(sdist):
    def make_distribution(self):
        self.filelist.append('settings.ini')
        super().make_distribution()


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', keywords=cfg['keywords'].split(),
    python_requires='>='+cfg['min_python'], install_requires=cfg['requirements'].split(), extras_require=extras,
    # notebooks and shipped data live beside the package in the repository and inside it in a wheel
    packages=['mebqat', *(f'mebqat.{w}' for w in WINGS), 'mebqat._nbs', 'mebqat._data'],
    package_dir={'mebqat': 'mebqat', 'mebqat._nbs': 'nbs', 'mebqat._data': 'data'},
    package_data={'mebqat': ['static/*'], 'mebqat._nbs': ['*.ipynb', '*/*.ipynb'], 'mebqat._data': ['**/*']},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Intended Audience :: Science/Research', 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    zip_safe=False, cmdclass={'sdist': SourceArchive},
)
