"""Where panoramas come from: sampling plans, sources of imagery, and the card that says what a table holds.

`plans` says where to look, `costs` what that will take, `fetching` asks a source (`streetview`, `mapillary`,
`panoramax`), and `card` describes what came of it. Nothing is imported here: plans and cards need geopandas and
matplotlib, which the processes that fetch should not pay for.
"""
