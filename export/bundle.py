"""`export_bundle`: `export.run` as a Python function.

from export.bundle import export_bundle
from export.options import ExportOptions

manifest = export_bundle(ExportOptions(run="runs/mine", output="bundles/mine", max_batch=32))
"""

from contract.manifest import Manifest
from contract.signing import read_private_key
from export.options import ExportOptions
from export.output import check_output


def export_bundle(options: ExportOptions) -> Manifest:
    """Export a run folder to a bundle of graphs and engines, and return its manifest.

    Prints the parity of every output with the torch student. Raises UserError for what the user can
    correct (an output that must stay, engines that cannot be built here, a run that cannot be read)
    and Failure where graphs disagree with the student; either way `options.output` is as it was.
    """
    place = check_output(options.output, options.force, options.inputs)

    key = read_private_key(options.sign, "--sign") if options.sign else None

    # torch and timm take seconds to load: mistakes in the options are reported before
    from export.assemble import assemble
    from export.tensorrt.engines import check_buildable

    # what engines need is checked before the minutes that graphs take
    engines = options.engines()
    for engine in engines:
        check_buildable(engine)
    return assemble(options, engines, place, key)
