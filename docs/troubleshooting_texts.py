"""The texts of docs/troubleshooting.md around the messages; the keys are messages of the package."""

INTRODUCTION = """\
# Troubleshooting

Generated from the code by `python docs/make_troubleshooting.py`: edit the messages there. Search this page for a part
of your message that contains no names or numbers of your own: `‹name›` and `…` stand for the parts that vary.

## How to read a message

```
error: bucket 7 is empty; got 0; allowed: 1 or more; because ‹cause›; to do: lower num_duration_buckets
```

The parts are: what happened; what was *got* and what is *allowed*; the cause (*because*); and the fix (*to do*). A
message has only the parts it needs. If no cause is listed below, the message itself states the cause. "What the system
says" is a text from the operating system, a storage system or a library. Secrets in messages are redacted.

| exit code | meaning |
|---|---|
| 0 | done, or nothing to do |
| 1 | an error on this page; for `transcribe`, some recordings have no text; for `doctor`, a check failed |
| 2 | invalid command line: an unknown option or command, or a value of the wrong type |
| 130 | Ctrl-C; the same command resumes the work |

| where to look | content |
|---|---|
| `statistics.json`, tables of `statistics` and `assign` | rejected rows by corpus and reason, some with their line |
| `assignment/rejected/` | every row without a bucket, with its reason |
| `quarantine.jsonl` | recordings that training could not read and replaced by others from their bucket |
| `bad_steps/` | the rows of steps with non-finite gradients |
| `hypotheses.jsonl` | from `evaluate`: recordings without a text, with the error |
| `raytrain doctor --config FILE` | versions, GPUs, memory, limits and storage of every node, and how to fix problems |
| `raytrain logs JOB` | the output of a submitted run |

## Errors by class

In Python, all errors are subclasses of `raytrain.errors.RaytrainError` with the parts as attributes (`what`, `got`,
`allowed`, `why`, `remedy`). Errors that tell you what to *pass* concern calls from Python.
"""

USAGE = """\
## The command line

Exit code 2; `raytrain COMMAND --help` lists the options. In addition to the messages of the command line library:
"""

PROBLEMS = """\
## Configuration and model problems

A single error lists everything that is wrong with a configuration (`FILE has 2 problem(s)`), each problem with its
setting and, for an unknown key, the nearest known key. Errors about a model list its problems in the same way. The
entries:
"""

ROWS = """\
## Rejected rows

`statistics` and `assign` print a table of them. Above `data.max_bad_fraction` they are an error.

| reason | meaning | fix |
|---|---|---|"""

# Reason of a rejected row → meaning, fix.
REASONS = {
    "bad_json": (
        "the line is not a JSON object or not a Lhotse cut, or a CSV row does not match its header",
        "fix the line given in the table",
    ),
    "missing_field": (
        "`audio_filepath`, `duration` or `text` is missing, or the language is unknown",
        "add the field; for the language, set data.default_language or the corpus' language",
    ),
    "bad_duration": (
        "`duration` is not above 0, or it or `offset` is not a number of seconds up to 1e9",
        "write both in seconds, as numbers",
    ),
    "bad_text": (
        "`text` is not a string, or contains invalid characters (NUL, half a surrogate pair)",
        "write it as a string of valid Unicode",
    ),
    "empty_text": (
        "`text` has no visible characters: it is empty, white space or zero-width characters",
        "transcribe the recording or remove the row",
    ),
    "missing_audio": (
        "the file does not exist on the node that counts",
        "correct the path or data.root, or add the audio; the stages detect that it is there",
    ),
    "unreadable_audio": (
        "the header of a sampled recording can't be read: not audio, truncated, or an unsupported format",
        "fix the recording or remove its row",
    ),
    "short_audio": (
        "a sampled recording is more than a tenth shorter than its row claims; the row is used anyway",
        "correct `duration` and `offset`, or the path: the row may point to a different recording",
    ),
    "wrong_shard": (
        "`shard_id` differs from the number of the row's tar",
        "pair each manifest with its own tar: check the corpus' `path` and `audio`",
    ),
    "unknown_language": (
        "the tokenizer has no model for the row's source or target language",
        "correct `source_lang` or `target_lang`, or train a tokenizer with this language",
    ),
    "bad_slot": (
        "a prompt field (`pnc`, `taskname`, `itn`, …) has a value that the prompt format does not define",
        "use a value listed in the detail, or omit the field",
    ),
    "unsupported_audio": (
        "the cut's audio is not in a file, at a URL or in the tar (it is a command, for example)",
        "write the cuts with `SharWriter` and the field `recording`",
    ),
    "bad_audio": (
        "the recording can't be opened, or is not in its tar or Parquet file",
        "check the path and data.root, or correct the row",
    ),
    "skipme": ("the row requests it (`_skipme`); it does not count as bad", "nothing, or remove `_skipme`"),
    "too_short": ("shorter than buckets.min_duration_ms", "lower the limit, or leave such utterances out"),
    "too_long": ("longer than buckets.max_duration_ms", "cut the recording into pieces, or raise the limit"),
    "too_many_tokens": (
        "the text with its prompt has more than buckets.max_tokens, or more than the last bucket of its duration allows",
        "raise buckets.max_tokens, or split the utterance",
    ),
    "tps_outlier": (
        "more tokens per second than buckets.max_tps or buckets.tps_sigma allow: often the text of another recording",
        "correct the text; or raise buckets.tps_sigma or max_tps",
    ),
}

# Warning → meaning and fix.
WARNINGS = {
    "‹what› can't be compiled and runs uncompiled, slower; because …; to do: install the Triton of this torch and a C compiler, or set train.compile: never": "Training continues, slower and with more memory than oomptimize predicted ([training](training.md#compiled-steps)).",
    "attention keeps its scores, which takes more memory and time; because ‹fault›; to do: install the Triton of this torch": "Training continues. The kernel for attention did not compile on this GPU, or disagreed with plain PyTorch on a small batch.",
    "attention runs in plain PyTorch, slower and with more memory, because ‹fault›": "As above, where attention's operator is called by itself.",
    "… can be read by anyone with the cluster's token (Jobs API, dashboard); it is safer to set credentials on the nodes": "Variables named with `--env` become part of the job. Set them on the nodes instead.",
    "‹failed› of ‹rows› rows have no text; their field error says why": "Fix what the field `error` of the output reports, and run the command again.",
    "the demo did not write …": "A stage of the demo did not write its artifact: read the messages above this one.",
    "WER ‹wer› is above 20%; something is wrong": "The demo normally learns its corpus: run `make test` and `raytrain doctor`.",
    "‹number› test row(s) left out: ‹reason›": "See *Rejected rows* for the reason.",
    "‹unreadable› recording(s) can't be read; hypotheses.jsonl says why": "Scores cover the other rows only. Fix or remove the recordings, and run `raytrain evaluate` again.",
    "… can't be copied to … (…); the next checkpoint tries again": "Training continues. Check train.storage_path, its credentials and the network.",
    "… requires no token: anyone who can reach its ports can run code as its user (CVE-2023-48022); start Ray with "
    "RAY_AUTH_MODE=token": "[Security](security.md) shows how to start it.",
    "training waits for data …% of its time: …": "GPUs are idle in the meantime; the warning suggests a fix ([schedule](schedule.md#data-loading-bottlenecks)).",
    "MLflow is unavailable (…); metrics.jsonl keeps everything": "Training continues, and missing entries are sent when the server responds. Check tracking.uri.",
    "the tokenizer can't encode all characters of the texts, so a model can't produce them:‹listing›": "Remove these characters from the texts, or use a tokenizer that has them; above "
    "tokenizer.max_unknown_fraction it is an error.",
    "corpus ‹name› has no row that training can use: ‹files›": "The file is empty, or all of its rows are rejected (see the table). Fix it, or remove the corpus from "
    "data.train.",
    "‹rows› of the ‹probed› recordings of ‹corpus› that were checked ‹what›: ‹file›:‹line›: ‹detail›": "A sample of headers contradicts the manifest: see `short_audio` and `unreadable_audio` above.",
    "‹broken› recording(s) can't be read (quarantine.jsonl names them); training replaces them with others": "Fix or remove them; above data.max_bad_fraction, training ends.",
    "‹references_changed› of … references are scored as normalized by the tokenizer; hypotheses.jsonl has both forms": "Scores compare what a model can write: texts in NFC, after the tokenizer's normalization (full-width letters, ligatures).",
    "nothing was scored; something is wrong": "The demo's test recordings can't be read: check hypotheses.jsonl.",
    "… has … for Ray's sockets: they are in …": "A socket's path is limited to 107 bytes, all ASCII. No action is needed; with a shorter TMPDIR, Ray's files stay there.",
    "MLflow's database is damaged (…); move it away to have a new one created; metrics.jsonl keeps everything": "Move the named file away; the next run writes everything in metrics.jsonl to a new one.",
    "MLflow refused an entry (…)": "The entry is missing only in MLflow; metrics.jsonl has it. Check the server's own log.",
}

# Module → warnings whose text is built elsewhere or passed to the function that warns.
INDIRECT_WARNINGS = {
    "raytrain/stages/train.py": ["training waits for data …% of its time: …"],
    "raytrain/tracking/mlflow.py": [
        "MLflow is unavailable (…); metrics.jsonl keeps everything",
        "MLflow refused an entry (…)",
        "MLflow's database is damaged (…); move it away to have a new one created; metrics.jsonl keeps everything",
    ],
}

END = """\
## Messages that are not errors

- **`up to date`** next to a stage: no setting and no file that it depends on has changed since it ran. To rerun it,
  delete its artifact (`raytrain run` lists the stages; the README lists their artifacts).
- **`training resumes from step N`**: there is a complete checkpoint of this run. To start at step 0, use another
  `name`.
- **`restarting training: …`**: a worker was lost, or a batch did not fit and was made smaller. Training resumes from
  the last checkpoint.
- **`stopped; run the same command again to resume`**: Ctrl-C. Finished work is kept.
- **Ray's own lines**, such as `(raylet) …`, `(autoscaler) …` or `E0000 … gcs_client`: they come from Ray's processes,
  not from raytrain. They matter only if an error follows, whose message has Ray's last line as its cause. The full logs
  are in `/tmp/ray/session_latest/logs` on the node in question.
- **A pause at the start**: Ray starts its processes, and each worker imports PyTorch; this takes half a minute on a
  busy machine.
- **Fewer rows than the manifest has**: see *Rejected rows*.
"""
