import subprocess
import sys

import torch
from torch import nn

from hedwig.models.shapes import shapes_only


def test_modules_have_shapes_and_no_values():
    with shapes_only():
        made = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 6), nn.MultiheadAttention(8, 2), nn.LayerNorm(4))
        cut = nn.init.trunc_normal_(nn.Parameter(torch.empty(7, 2)), std=0.1)
    assert [tuple(p.shape) for p in made[0].parameters()] == [(4, 3), (4,)]
    assert cut.shape == (7, 2)
    assert all(p.is_meta and p.requires_grad for p in (*made.parameters(), cut))
    assert not nn.Linear(2, 2).weight.is_meta


def test_an_encoder_is_made_without_importing_the_compiler():
    script = (
        "import sys; from hedwig.models.encoder import load_encoder; load_encoder('viclip-tiny'); "
        "sys.exit(' '.join({'sympy', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
