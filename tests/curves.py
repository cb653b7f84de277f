"""Runs made up of numbers: folders with metrics and a config, for tests of what reads them."""

import json


def lines_of(drawn, steps, every=5, growing=True):
    """Metrics of a run whose losses are drawn: validation before the first step, and every few."""
    lines = [{"step": 0, "tokens_seen": 0, "elapsed_s": 0.0, "validation_loss": 7.0}]
    tokens, least = 0, {}
    for step in range(1, steps + 1):
        seqlen = min(8 * (1 + step // 4), 32) if growing else 32
        tokens += 4 * seqlen
        loss = 7 * 0.99**step * drawn.uniform(0.8, 1.3)
        line = {"step": step, "tokens_seen": tokens, "elapsed_s": step * 0.5, "seqlen": seqlen, "loss": loss}
        line |= {
            "loss_ratio": loss / least.get(seqlen, loss),
            "loss_ratio_overall": loss / min(least.values(), default=loss),
            "variance_l1": drawn.uniform(1, 9),
            "clipped": step % 2 / 4,
        }
        line |= {"variance_max": drawn.uniform(0.1, 0.9), "grad_norm": 1.0, "lr": 1e-3}
        least[seqlen] = min(loss, least.get(seqlen, loss))
        if step % every == 0 or step == steps:
            line["validation_loss"] = 7 * 0.99**step * drawn.uniform(0.97, 1.03)
        lines.append(line)
    return lines


def write_run(folder, lines, **config):
    """RUN/metrics.jsonl, and RUN/config.json of `config`, section__key=value."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {key.replace("__", "."): value for key, value in config.items()}
    if settings:
        (folder / "config.json").write_text(json.dumps({"run.dir": str(folder), **settings}))
    return folder
