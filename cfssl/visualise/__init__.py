"""Pictures and the report page. The roof: it may look into every room, and nothing below imports it."""

# Okabe and Ito (2008), told apart by colour-blind readers; yellow is left out because it vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
