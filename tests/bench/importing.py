"`import mebqat` in a fresh interpreter. Budget: 0.1 s."
import subprocess
import sys

from _paired import paired, report

run = lambda code: lambda: subprocess.run([sys.executable, '-c', code], check=True)
report('import', paired({'python': run('pass'), 'import mebqat': run('import mebqat'), 'import torch': run('import torch')}, rounds=5), 'ratio to an empty interpreter')
