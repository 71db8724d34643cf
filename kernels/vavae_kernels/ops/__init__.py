"""One file an operator: formula, bytes, reference, public function."""
