"""
`import cada` once, and the Auto classes and `pipeline` of transformers know CADA without `trust_remote_code`:

    import cada
    model = AutoModel.from_pretrained("org/cada-cuhk")

It never travels with a checkpoint: there it would make a second checkpoint run the code of the first.
"""

import os


# Read by OpenMP when torch is loaded: threads that wait for each other sleep. By default they spin, and beside one
# busy process on the same cores a training step took twenty times as long (benchmarks/demo.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor  # noqa: E402
from transformers.pipelines import PIPELINE_REGISTRY  # noqa: E402

from configuration_cada import TASK, CADAConfig  # noqa: E402
from modeling_cada import CADAForTextToImageRetrieval  # noqa: E402
from pipeline_cada import CADAPipeline  # noqa: E402
from processing_cada import CADAImageProcessor, CADAProcessor  # noqa: E402


AutoConfig.register("cada", CADAConfig)
AutoModel.register(CADAConfig, CADAForTextToImageRetrieval)
AutoImageProcessor.register(CADAConfig, image_processor_classes={"pil": CADAImageProcessor})
AutoProcessor.register(CADAConfig, CADAProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, CADAPipeline, pt_model=AutoModel, type="multimodal")
