"""A witness of transparency logs (C2SP tlog-witness): a small process that an owner or a third
party runs, and that cosigns a log's checkpoint only when it extends every one it cosigned before.

``decide`` is the rule, without I/O; ``state`` keeps what was cosigned; ``service`` joins both;
``serve`` speaks HTTP. docs/adr/0010-witness.md says why it is made so.
"""
