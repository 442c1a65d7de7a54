"""One module per operator: docstring, validation, reference, records, public function, fake kernels, autograd."""
