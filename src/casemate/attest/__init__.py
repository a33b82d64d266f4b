"""Checking evidence: parse, collateral, verify, appraise, each apart; roots and time passed in."""
