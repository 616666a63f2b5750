"""Command lines over the library: a module each, with a `main` that a console command and a starter in the checkout's
`tools/` or `launch/` call. They import what is heavy inside their functions (`skvr_dist.command` says why).
"""
