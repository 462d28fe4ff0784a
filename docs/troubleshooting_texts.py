"""What docs/troubleshooting.md says beside the messages themselves; the keys are the messages of the package."""

INTRODUCTION = """\
# Troubleshooting

Made by `python docs/make_troubleshooting.py` from the code: change the messages there. Search this page for a part of
the message that has no name or number of yours in it: `‹name›` and `…` stand for what differs.

## How to read a message

```
error: bucket 7 is empty; got 0; allowed: 1 or more; because ‹cause›; to do: lower num_duration_buckets
```

What happened; what was *got* and what is *allowed*; *because* of what; and what there is *to do*. A message has those
parts that it needs; where no cause is listed below, the message is the cause. "What the system says" is a text of the
operating system, of a store or of a library. Secrets in messages are blotted out.

| exit code | meaning |
|---|---|
| 0 | done, or nothing to do |
| 1 | an error of this page; of `transcribe`, some recordings have no text; of `doctor`, something is wrong |
| 2 | the command line is wrong: an option or command that doesn't exist, or a value of the wrong type |
| 130 | Ctrl-C; the same command goes on from there |

| where to look | what is there |
|---|---|
| `statistics.json`, tables of `statistics` and `assign` | rows left out by corpus and reason, some with their line |
| `assignment/rejected/` | every row that got no bucket, with its reason |
| `quarantine.jsonl` | recordings that training could not read and replaced by others of their bucket |
| `bad_steps/` | the rows of steps whose gradients were not finite |
| `hypotheses.jsonl` | of `evaluate`: recordings that have no text, with the error |
| `raytrain doctor --config FILE` | versions, GPUs, memory, limits, storage of every node; it says what to do |
| `raytrain logs JOB` | what a submitted run printed |

## Errors by class

In Python all are `raytrain.errors.RaytrainError`s with the parts as attributes (`what`, `got`, `allowed`, `why`,
`remedy`). Errors that speak of what to *pass* are about calls from Python.
"""

USAGE = """\
## The command line

Exit code 2; `raytrain COMMAND --help` lists what there is. Beside the messages of the command line's library:
"""

PROBLEMS = """\
## What a message lists

One error lists all that is wrong with a configuration (`FILE has 2 problem(s)`), each with its setting and, for an
unknown key, the nearest known one. Errors about a model list what is wrong with it in the same way. The parts:
"""

ROWS = """\
## Rows that are left out

`statistics` and `assign` print a table of them. Above `data.max_bad_fraction` they are an error.

| reason | what it means | to do |
|---|---|---|"""

# Reason of a row that is left out → what it means, what to do.
REASONS = {
    "bad_json": (
        "the line is no JSON object, no cut as Lhotse writes it, or a CSV row unlike its heading",
        "mend the line that the table names",
    ),
    "missing_field": (
        "`audio_filepath`, `duration` or `text` is absent, or no language is known",
        "add the field; for the language set data.default_language or the corpus' language",
    ),
    "bad_duration": (
        "`duration` is not above 0, or it or `offset` is no number of seconds up to 1e9",
        "write both in seconds, as numbers",
    ),
    "bad_text": (
        "`text` is no text, or holds characters that no text has (NUL, half a surrogate pair)",
        "write it as a string of valid Unicode",
    ),
    "empty_text": (
        "`text` has nothing to see: it is empty, white space or zero-width characters",
        "transcribe the recording or remove the row",
    ),
    "missing_audio": (
        "there is no such file on the node that counts",
        "correct the path or data.root, or bring the audio; the stages notice that it came",
    ),
    "unreadable_audio": (
        "the header of a sampled recording can't be read: no audio, cut short, an odd format",
        "mend the recording or remove its row",
    ),
    "short_audio": (
        "a sampled recording is more than a tenth shorter than its row says; the row is used all the same",
        "correct `duration` and `offset`, or the path: the row may name another recording",
    ),
    "wrong_shard": (
        "`shard_id` is another than the number of the row's tar",
        "pair each manifest with its own tar: look at the corpus' `path` and `audio`",
    ),
    "unknown_language": (
        "the tokenizer has no model of the row's source or target language",
        "correct `source_lang` or `target_lang`, or train a tokenizer with this language",
    ),
    "bad_slot": (
        "a prompt field (`pnc`, `taskname`, `itn`, …) has a value that the prompt format lacks",
        "write a value that the detail lists, or leave the field out",
    ),
    "unsupported_audio": (
        "the cut's audio is not in a file, an address or the tar (a command, for example)",
        "write the cuts with `SharWriter` and the field `recording`",
    ),
    "bad_audio": (
        "the recording can't be opened, or not be found inside its tar or Parquet file",
        "check the path and data.root, or correct the row",
    ),
    "skipme": ("the row says so (`_skipme`); it does not count as bad", "nothing, or remove `_skipme`"),
    "too_short": ("shorter than buckets.min_duration_ms", "lower it, or leave such utterances out"),
    "too_long": ("longer than buckets.max_duration_ms", "cut the recording into pieces, or raise the limit"),
    "too_many_tokens": (
        "the text with its prompt has more than buckets.max_tokens, or than the last bucket of its duration",
        "raise buckets.max_tokens, or split the utterance",
    ),
    "tps_outlier": (
        "more tokens a second than buckets.max_tps or buckets.tps_sigma allow: often a text of another recording",
        "correct the text; or raise buckets.tps_sigma or max_tps",
    ),
}

# Warning → what it means and what to do.
WARNINGS = {
    "… can be read by whoever has the cluster's token (Jobs API, dashboard); better give the nodes their own": "Variables named with `--env` are part of the job. Set them where the nodes start instead.",
    "‹failed› of ‹rows› rows have no text; their field error says why": "Mend what the field `error` of the output names, and run the command again.",
    "the demo did not write …": "A stage of the demo left out its artefact: read the messages above this one.",
    "WER ‹wer› is above 20%; something is wrong": "The demo always learns its corpus: run `make test`, and `raytrain doctor`.",
    "‹number› test row(s) left out: ‹reason›": "See *Rows that are left out* for the reason.",
    "‹unreadable› recording(s) can't be read; hypotheses.jsonl says why": "Scores are those of the other rows. Mend or remove the recordings, and run `raytrain evaluate` again.",
    "… can't be copied to … (…); the next checkpoint tries again": "Training goes on. Check train.storage_path, its credentials and the network.",
    "… asks for no token: whoever reaches its ports can run code there as its user (CVE-2023-48022); start Ray with "
    "RAY_AUTH_MODE=token": "[Security](security.md) says how to start it.",
    "training waits for data …% of its time: …": "GPUs are idle meanwhile; the warning names what helps ([schedule](schedule.md)).",
    "MLflow is unavailable (…); metrics.jsonl keeps everything": "Training continues, and what is missing is sent when the server answers. Check tracking.uri.",
    "the tokenizer can't write all characters of the texts, nor will a model:‹listing›": "Clean the texts of these characters, or take a tokenizer that has them; above tokenizer.max_unknown_fraction "
    "it is an error.",
    "corpus ‹name› has no row that training can use: ‹files›": "The file is empty, or all of its rows are left out, see the table. Fix it, or leave the corpus out of "
    "data.train.",
    "‹rows› of the ‹probed› recordings of ‹corpus› that were checked ‹what›: ‹file›:‹line›: ‹detail›": "A sample of headers contradicts the manifest: see `short_audio` and `unreadable_audio` above.",
    "‹broken› recording(s) can't be read (quarantine.jsonl names them); in training others take their place": "Fix or remove them; above data.max_bad_fraction training ends.",
    "‹references_changed› of … references are compared as the tokenizer's normalizer writes them; hypotheses.jsonl has "
    "both": "Scores compare what a model can write: NFC, and what the tokenizer folds (full-width letters, ligatures).",
    "nothing was scored; something is wrong": "The demo's test recordings can't be read: look at hypotheses.jsonl.",
    "… has … for Ray's sockets: they are in …": "A socket's path ends at 107 bytes, all ASCII. Nothing is to do; a shorter TMPDIR keeps Ray's files there.",
    "MLflow's database is damaged (…); move it away, and a new one is made; metrics.jsonl keeps everything": "Move the file that it names away; the next run writes all that metrics.jsonl holds to the new one.",
    "MLflow refused an entry (…)": "Only MLflow lacks the entry; metrics.jsonl has it. Look at the server's own log.",
}

# Module → warnings whose text is made elsewhere or is given to the function that warns.
INDIRECT_WARNINGS = {
    "raytrain/stages/train.py": ["training waits for data …% of its time: …"],
    "raytrain/tracking/mlflow.py": [
        "MLflow is unavailable (…); metrics.jsonl keeps everything",
        "MLflow refused an entry (…)",
        "MLflow's database is damaged (…); move it away, and a new one is made; metrics.jsonl keeps everything",
    ],
}

END = """\
## What is no error

- **`up to date`** beside a stage: no setting and no file that it depends on has changed since it ran. To run it again
  delete its artefact (`raytrain run` names the stages; the README their artefacts).
- **`training resumes from step N`**: there is a whole checkpoint of this run. To begin at step 0 use another `name`.
- **`training starts again: …`**: a worker was lost, or a batch did not fit and has been made smaller. It goes on from
  the last checkpoint.
- **`stopped; run the same command again to resume`**: Ctrl-C. What is finished stays.
- **Ray's own lines**, such as `(raylet) …`, `(autoscaler) …` or `E0000 … gcs_client`: from Ray's processes, not from
  raytrain. They matter only where an error follows; its message has Ray's last line as its cause. The whole logs are in
  `/tmp/ray/session_latest/logs` of the node that it names.
- **A pause at the start**: Ray starts its processes, and each worker imports PyTorch; half a minute on a busy machine.
- **Fewer rows than the manifest has**: see *Rows that are left out*.
"""
