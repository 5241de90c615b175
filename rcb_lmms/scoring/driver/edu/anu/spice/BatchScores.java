package edu.anu.spice;

import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Paths;

/**
 * Scores the captions of a JSON file and writes the scores of each: arguments INPUT OUTPUT [options of SpiceScorer].
 *
 * SpiceScorer's own -out indents its JSON with the JavaScript engine, which Java 15 and later no longer have; it would
 * fail after hours of parsing. To compile: javac --release 8 -cp spice-1.0.jar:json-simple-1.1.1.jar BatchScores.java
 */
public class BatchScores {
    public static void main(String[] arguments) throws Exception {
        String[] options = arguments.clone();
        options[1] = "-silent";
        SpiceScorer scorer = new SpiceScorer();
        scorer.scoreBatch(new SpiceArguments(options));
        Files.write(Paths.get(arguments[1]), scorer.stats.toJSONString().getBytes(StandardCharsets.UTF_8));
    }
}
