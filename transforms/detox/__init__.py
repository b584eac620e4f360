"""Detoxification of a corpus by rewriting: segment, gate, localise, rewrite, accept.

Each module holds one pure function over a batch in flight, which takes its models as arguments;
`transforms.detox.steps` wraps them as the labelled steps a job composes, which load their models by name.
The method is HSPD's (Shao et al., "Detoxification for LLM: From Dataset Itself", 2026) with the gate, the explicit
spans, the acceptance conditions and the fallback ladder that its released code leaves out.
"""
