"""Evidence kind `tdx`: quotes of Intel TDX trust domains, versions 4 and 5, verified offline."""
