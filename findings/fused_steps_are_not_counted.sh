#!/usr/bin/env bash
# A fused optimizer's step does not raise the parameters' version counters, so autograd does not see it.
#
# Versions: torch 2.13.0 (CPU), Python 3.11, Linux.
#
# What one expects. A step writes to the parameters in place. So `parameter._version` goes up, and a
# second gradient of a loss that was computed before the step raises "one of the variables needed for
# gradient computation has been modified by an inplace operation". This is so for the loop over the
# parameters (foreach=False) and for the multi-tensor form (foreach=True), of SGD and of AdamW.
#
# What happens. With fused=True the counter stays where it is. The second gradient raises nothing, and
# it is another one: it is computed from the weights behind the step, and from activations before it.
# Whoever tells by version counters who has written to a tensor has to look at the numbers as well.
#
# Seen, the same for SGD and AdamW:
#     foreach=False: counted, RuntimeError
#     foreach=True: counted, RuntimeError
#     fused=True: not counted, another gradient
#
# Exits with 0 as long as this is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy

cat > script.py <<'PYTHON'
import torch


def step_between_two_gradients(make, **form):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    parameters = list(model.parameters())
    optimizer = make(parameters, lr=0.5, **form)
    loss = model(torch.ones(2, 3)).square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for parameter, gradient in zip(parameters, first):
        parameter.grad = gradient.clone()
    versions = [parameter._version for parameter in parameters]
    optimizer.step()
    counted = all(p._version > v for p, v in zip(parameters, versions))
    try:
        second = torch.autograd.grad(loss, parameters)
    except RuntimeError:
        outcome = "RuntimeError"
    else:
        alike = all(torch.equal(a, b) for a, b in zip(first, second))
        outcome = "the same gradient" if alike else "another gradient"
    return f"{'counted' if counted else 'not counted'}, {outcome}"


for form in ({"foreach": False}, {"foreach": True}, {"fused": True}):
    found = {step_between_two_gradients(make, **form) for make in (torch.optim.SGD, torch.optim.AdamW)}
    ((name, value),) = form.items()
    print(f"{name}={value}: {' / '.join(sorted(found))}")
PYTHON

cat > expected <<'TEXT'
foreach=False: counted, RuntimeError
foreach=True: counted, RuntimeError
fused=True: not counted, another gradient
TEXT
venv/bin/python script.py | tee seen
diff expected seen
