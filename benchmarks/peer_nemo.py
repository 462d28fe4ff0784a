"""The other side of a comparison: NeMo's training step or decoding, timed on request.

Runs in a separate environment (`pip install torch==2.13.0 'nemo_toolkit[asr]'`) and does not need raytrain. Reads one
request a line and answers each with one JSON line that starts with `@`; see `benchmarks/_peer.py`.
"""

import json
import sys
import time

import nemo
import torch
from nemo.collections.asr.models import EncDecMultiTaskModel


def train_step(model, request):
    model.train()
    batch, tokens = request["batch"], request["tokens"]
    audio = torch.randn(batch, int(request["seconds"] * 16000))
    sizes = torch.full((batch,), audio.shape[1])
    ids = torch.randint(5, model.tokenizer.vocab_size - 1, (batch, tokens))
    lengths = torch.full((batch,), tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad(set_to_none=True)
        log_probs, *_ = model(
            input_signal=audio, input_signal_length=sizes, transcript=ids[:, :-1], transcript_length=lengths - 1
        )
        loss = model.loss(log_probs=log_probs, labels=ids[:, 1:], output_mask=torch.ones_like(ids[:, 1:]).bool())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def decode(model, request):
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(model.cfg.decoding)
    config["strategy"] = request["strategy"]
    config["beam"] = {"beam_size": request["beam"], "len_pen": 0.0, "max_generation_delta": request["delta"]}
    if request["strategy"] == "greedy":
        config["greedy"] = {"max_generation_delta": request["delta"]}
    model.eval()
    model.change_decoding_strategy(OmegaConf.create(config))
    audio = torch.randn(request["batch"], int(request["seconds"] * 16000))
    sizes = torch.full((request["batch"],), audio.shape[1])
    prompt = torch.tensor([request["prompt"]] * request["batch"])
    with torch.inference_mode():
        _, _, states, mask = model(input_signal=audio, input_signal_length=sizes)

    def run():
        with torch.inference_mode():
            hypotheses = model.decoding.decode_predictions_tensor(
                encoder_hidden_states=states, encoder_input_mask=mask, decoder_input_ids=prompt
            )
        # The generated tokens, not the text, show whether both sides did the same work.
        return [
            len(hypothesis[0].y_sequence if isinstance(hypothesis, list) else hypothesis.y_sequence)
            for hypothesis in hypotheses
        ]

    return run


def main():
    torch.set_num_threads(int(sys.argv[2]))
    torch.manual_seed(0)
    model = EncDecMultiTaskModel.restore_from(sys.argv[1], map_location="cpu")
    print("@" + json.dumps({"nemo_toolkit": nemo.__version__, "torch": torch.__version__}), flush=True)
    work = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] != "run":
            work = {"train_step": train_step, "decode": decode}[request["do"]](model, request)
        start = time.perf_counter()
        result = work()
        print("@" + json.dumps({"seconds": time.perf_counter() - start, "result": result}), flush=True)


main()
