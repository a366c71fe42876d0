"Whose a folder is, and answers that are kept under their questions."
import errno, os, time
from pathlib import Path
import pytest
from mebqat.bits import Bits, BitSpace
from mebqat.files import Kind, load_whole, save_whole, whole, write_text
from mebqat.results import MARKER, check_folder, earlier_answer, foreign, is_ours, keep_answer, own_folder, question_beside
from mebqat.surface import Point, Surface


def writes(**files):
    def into(place):
        for name,text in files.items(): write_text(place/name.replace('_', '.'), text)
    return into


def listing(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path/'runs').mkdir()
    (tmp_path/'thesis.tex').write_text('%')
    with pytest.raises(ValueError, match=r"thesis.tex|runs"): own_folder(tmp_path, 'a test')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['runs', 'thesis.tex'] and not is_ours(tmp_path)
    assert is_ours(own_folder(tmp_path/'new'/'deep', 'a test'))


@pytest.mark.parametrize('there', ['.DS_Store', 'Thumbs.db', 'desktop.ini', '.mebqat-host-1-ab.part', '.writer.lock'])
def test_what_a_system_or_a_killed_writer_left_is_nobodys(tmp_path, there):
    (tmp_path/there).write_text('')
    assert is_ours(own_folder(tmp_path, 'a test'))


def test_a_run_json_of_somebody_else_is_no_marker(tmp_path):
    (tmp_path/'run.json').write_text('{"format": "ours", "steps": 3}')
    assert foreign(tmp_path) == ['run.json']
    with pytest.raises(ValueError, match='run.json'): check_folder(tmp_path)


def test_copied_weights_may_have_results_beside_them(tmp_path):
    import torch
    save_whole(tmp_path/'model.safetensors', {'w': torch.ones(2)}, {'format': 'mebqat-weights'})
    check_folder(tmp_path)
    (tmp_path/'model.bin').write_bytes(b'PK')
    with pytest.raises(ValueError, match='model.bin'): check_folder(tmp_path)


def test_a_file_and_a_place_below_one_are_no_folders(tmp_path):
    (tmp_path/'f').write_text('')
    for place in (tmp_path/'f', tmp_path/'f'/'g'):
        with pytest.raises(NotADirectoryError, match='is a file'): check_folder(place)


def test_answers_to_other_questions_stay(tmp_path):
    out = own_folder(tmp_path/'o', 'a test')
    keep_answer(out, 'surfaces', {'split': 'test'}, writes(a_json='1', b_html='one'), 'test')
    keep_answer(out, 'surfaces', {'split': 'val'}, writes(a_json='2'), 'val')
    assert (out/'a.json').read_text() == '2' and not os.path.lexists(out/'b.html')
    first = earlier_answer(out, 'surfaces', {'split': 'test'}, 'test')
    assert {p.name: p.read_text() for p in first.iterdir() if p.name != 'question.json'} == {'a.json': '1', 'b.html': 'one'}
    assert question_beside(out/'a.json') == {'split': 'val'} and question_beside(tmp_path/'x') == {}


def test_an_answer_again_takes_the_place_of_the_first(tmp_path):
    out = own_folder(tmp_path/'o', 'a test')
    for k in range(3): keep_answer(out, 's', {'q': 1}, writes(a_json=str(k)))
    assert [p.name.split('.')[-1] for p in (out/'s').glob('all-*')] == ['3'] and (out/'a.json').read_text() == '2'
    (out/'s').joinpath(os.readlink(out/'s'/'newest'), 'mine.txt').write_text('a note of the user')
    keep_answer(out, 's', {'q': 1}, writes(a_json='9'))
    assert len(list(out.rglob('mine.txt'))) == 1 and (out/'a.json').read_text() == '9'


@pytest.mark.parametrize('after', [0, 1])
def test_a_failure_leaves_the_answer_before(tmp_path, after):
    out = own_folder(tmp_path/'o', 'a test')
    keep_answer(out, 's', {'q': 1}, writes(a_json='good', b_html='good'))
    before = listing(out)
    def full(place):
        if after: write_text(place/'a.json', 'bad')
        raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(OSError): keep_answer(out, 's', {'q': 1}, full)
    assert listing(out) == before and (out/'a.json').read_text() == (out/'b.html').read_text() == 'good'


def test_a_file_of_an_earlier_version_moves_over(tmp_path):
    out = own_folder(tmp_path/'o', 'a test')
    (out/'a.json').write_text('measured by an earlier version')
    keep_answer(out, 's', {'q': 1}, writes(a_json='new'))
    assert (out/'a.json').read_text() == 'new' and (out/'s'/'earlier.1'/'a.json').read_text().startswith('measured')


def test_without_links_the_files_are_copies(tmp_path, monkeypatch):
    def none(*args): raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(os, 'symlink', none)
    out = own_folder(tmp_path/'o', 'a test')
    for k in (1, 2): keep_answer(out, 's', {'q': 1}, writes(a_json=str(k), b_html=str(k)))
    assert (out/'a.json').read_text() == (out/'b.html').read_text() == '2' and not (out/'a.json').is_symlink()
    assert not [p for p in out.rglob('*') if 'mebqat-' in p.name]


# One file

def test_a_killed_writers_part_goes_with_the_next_write(tmp_path):
    from mebqat.files import _HOST as host
    dead, elsewhere, old, mine = (tmp_path/f'.mebqat-{h}-{p}-ab12.part' for h,p in ((host, 2**22 + 1), ('other_host', 7), ('third_host', 8), (host, os.getpid())))
    for p in (dead, elsewhere, old, mine): p.write_text('half')
    os.utime(old, (time.time() - 2*86400,)*2)
    write_text(tmp_path/'x.txt', 'whole')
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['x.txt', elsewhere.name, mine.name])


def test_two_writers_of_one_process_do_not_meet(tmp_path):
    with whole(tmp_path/'x') as a, whole(tmp_path/'x') as b:
        a.write_text('first')
        b.write_text('second')
    assert (tmp_path/'x').read_text() == 'first' and a != b and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('size', [0, 1, 1000])
def test_no_flipped_bit_of_tensors_or_description_is_accepted(tmp_path, size):
    import random, torch
    tensors = {'a': torch.arange(size).float(), 'b.c': torch.tensor(3), 'h': torch.ones(2, 3, dtype=torch.bfloat16)}
    file, rng = save_whole(tmp_path/'x.safetensors', tensors, {'format': 'x', 'note': 'é'}), random.Random(size)
    good = file.read_bytes()
    for _ in range(150):
        bad, at = bytearray(good), rng.randrange(len(good))
        bad[at] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(ValueError, match='damaged') as e: load_whole(file)
        assert '\n' not in str(e.value)


def test_a_file_of_before_checksums_opens(tmp_path):
    import json, torch
    from safetensors.torch import save_file
    save_file({'a': torch.ones(3)}, tmp_path/'old.safetensors', metadata={'mebqat': json.dumps({'format': 'mebqat-weights'})})
    assert load_whole(tmp_path/'old.safetensors')[1] == {'format': 'mebqat-weights'}


def test_a_kind_keeps_what_json_can_say_and_says_what_it_cannot(tmp_path):
    kind = Kind('mebqat-thing', 3, {'rows': [dict], '...': object}, 'make it again', older=(1, 2))
    rows = [{'points": []': '"points": []'}, {'x': 1e-300, 'y': -0., 'z': 12345678901234567}, {'é': '\u2028 \x1b ]]>'}]
    assert kind.read(kind.write(tmp_path/'t.json', rows=rows, more={1: 'one', 'b': None}))['rows'] == rows
    with pytest.raises(ValueError, match='thing must be JSON-able'): kind.dumps(rows=[{'x': float('nan')}])
    with pytest.raises(FileNotFoundError, match='none.json'): kind.read(tmp_path/'none.json')
    with pytest.raises(ValueError, match='is no file'): kind.read(tmp_path)


def test_a_second_surface_adds_its_pairs(tmp_path):
    from mebqat.runs.surfaces import joined
    from mebqat.fewshot.evaluate import EpisodeScores
    import torch
    scores = lambda pairs, v: EpisodeScores({b: torch.full((4,), v) for b in BitSpace.parse(pairs)}, 't', {'n': 4})
    both = joined(scores('W2A2 W4A4', .5), scores('W4A4 W8A8', .75))
    assert [str(b) for b in both.accuracy] == ['W2A2', 'W4A4', 'W8A8'] and both.surface().at(Bits(4, 4)).accuracy == .75
    assert joined(None, both) is both
