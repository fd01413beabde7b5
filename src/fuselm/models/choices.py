"""Name the number types that a model can be run in, and say what each means. docs/machines.md has measurements."""

DTYPES: dict[str, str] = {
    "auto": "Use the fastest type on this machine that is as precise as the checkpoint's.",
    "float32": "Compute in 32 bits.",
    "bfloat16": "Compute in bfloat16.",
    "float16": "Compute in float16.",
}
