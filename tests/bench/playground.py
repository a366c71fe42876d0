"The playground on the shipped network, 20 ways and 60 queries, without a browser: seconds from a move of the bits to changed figures. Budget: live 1 s, kept 0.1 s."
import statistics, time

import torch

torch.set_num_threads(1)
from mebqat.runs.answers import playing
from mebqat.explore.playground import FewShotPlayground


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


play = FewShotPlayground(**playing(n_way=20, n_query=3))
pairs = list(play.picker.space)
for what in ('live', 'kept'):
    took = [timed(lambda b=b: setattr(play, 'value', b)) for b in pairs if b != play.value]
    print(f'{what}: median {statistics.median(took):.3f} s, most {max(took):.3f} s over {len(took)} moves')
took = [timed(play.another.click) for _ in range(10)]
print(f'new episode: median {statistics.median(took):.3f} s, most {max(took):.3f} s')
print(f'baked twin: {timed(play.bake):.2f} s, {len(play.bake().to_json())/1e3:.0f} kB without plotly.js')
