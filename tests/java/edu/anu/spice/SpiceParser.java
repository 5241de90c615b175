package edu.anu.spice;

import edu.cmu.meteor.aligner.SynonymDictionary;
import edu.cmu.meteor.util.Constants;
import java.io.IOException;
import java.net.URL;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.Iterator;
import java.util.List;

/** Stands in for the parser that needs CoreNLP's models: every word of a caption is an object, "a" is none. */
public class SpiceParser {
    private final SynonymDictionary synonyms;

    public SpiceParser(String cache, int threads, Boolean merge) throws IOException {
        String place = Constants.DEFAULT_SYN_DIR_URL.toString();
        synonyms = new SynonymDictionary(
            new URL(place + "/english.exceptions"),
            new URL(place + "/english.synsets"),
            new URL(place + "/english.relations"));
    }

    public List<SceneGraph> parseCaptions(List<String> captions) {
        return parseCaptions(captions, Collections.nCopies(captions.size(), 1));
    }

    public List<SceneGraph> parseCaptions(List<String> captions, List<Integer> perImage) {
        List<SceneGraph> graphs = new ArrayList<>();
        Iterator<String> next = captions.iterator();
        for (int count : perImage) {
            SceneGraph graph = new SceneGraph(synonyms, true);
            for (int i = 0; i < count; i++) {
                for (String word : next.next().split(" ")) {
                    if (!word.equals("a") && !word.isEmpty()) {
                        graph.addTuple(new ArrayList<>(Arrays.asList(word)));
                    }
                }
            }
            graphs.add(graph);
        }
        return graphs;
    }
}
