"""
Import this once, and the Auto classes and `pipeline` of transformers know CADA without `trust_remote_code`:

    import register_cada
    model = AutoModel.from_pretrained("org/cada-cuhk")

It never travels with a checkpoint: there it would make a second checkpoint run the code of the first.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from configuration_cada import TASK, CADAConfig
from modeling_cada import CADAForTextToImageRetrieval
from pipeline_cada import CADAPipeline
from processing_cada import CADAImageProcessor, CADAProcessor


AutoConfig.register("cada", CADAConfig)
AutoModel.register(CADAConfig, CADAForTextToImageRetrieval)
AutoImageProcessor.register(CADAConfig, image_processor_classes={"pil": CADAImageProcessor})
AutoProcessor.register(CADAConfig, CADAProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, CADAPipeline, pt_model=AutoModel, type="multimodal")
